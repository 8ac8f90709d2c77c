"""Cost of a rollout: stepping a TextVectorEnv with the cached decoder, beside `model.generate` on the same work.

    python benchmarks/rollout.py                      # the embedded model, 64 rows x 48 tokens, one thread
    python benchmarks/rollout.py --rows 16 --new-tokens 96 --repeats 15

Both sides sample every token of every row from the full distribution; no row ends early. Each repeat runs both, in
turns, so that a busy machine slows both. Printed: the median of the paired ratios, the environment's own share, and the
floating-point operations counted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import textgym  # noqa: F401  (registers the ids)
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import load_tokenizer


@dataclass
class Config:
    model: str = "tiny"
    rows: int = 64
    prompt_tokens: int = 16
    new_tokens: int = 48
    repeats: int = 9
    threads: int = 1


def zero_reward(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def make_sides(config: Config) -> tuple[Callable[[], dict[str, float]], Callable[[], None], ActorCritic]:
    policy = ActorCritic.from_pretrained(config.model)
    tokenizer = load_tokenizer(config.model)
    ids = torch.randint(
        300, len(tokenizer), (config.rows, config.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    envs: Any = gym.make_vec(
        "textgym/Text-v0",
        num_envs=config.rows,
        prompts=["."],
        tokenizer=tokenizer,
        reward=zero_reward,
        max_prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        min_new_tokens=config.new_tokens,
        array="torch",
    )
    task = envs.unwrapped.task
    # The same prompt ids on both sides; text would not give ids of one length.
    task.prompt_ids, task.prompt_lengths = ids.int().numpy(), torch.full((config.rows,), config.prompt_tokens).numpy()
    task.rows = [{"prompt": "."}] * config.rows

    def ours() -> dict[str, float]:
        policy.reset_cache()
        started = time.perf_counter()
        observation, _ = envs.reset(options={"prompt_index": range(config.rows)})
        env_seconds = time.perf_counter() - started
        for _ in range(config.new_tokens):
            action = policy.act(observation, action_masks=envs.action_masks()).action
            before = time.perf_counter()
            observation, *_ = envs.step(action)
            env_seconds += time.perf_counter() - before
        return {"seconds": time.perf_counter() - started, "env_seconds": env_seconds}

    def theirs() -> None:
        policy.lm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.new_tokens,
            min_new_tokens=config.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )

    return ours, theirs, policy


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main(config: Config) -> dict[str, float]:
    torch.set_num_threads(config.threads)
    ours, theirs, _ = make_sides(config)
    ours(), theirs()
    ratios, shares = [], []
    for _ in range(config.repeats):
        mine = ours()
        started = time.perf_counter()
        theirs()
        ratios.append(mine["seconds"] / (time.perf_counter() - started))
        shares.append(mine["env_seconds"] / mine["seconds"])
    result = {
        "wall_time_ratio_to_generate": statistics.median(ratios),
        "env_share_of_our_time": statistics.median(shares),
        "env_share_of_generate_time": statistics.median(s * r for s, r in zip(shares, ratios, strict=True)),
        "flops_ratio_to_generate": flops(ours) / flops(theirs),
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}, indent=2))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
