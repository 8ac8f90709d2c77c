"""Cost of a rollout, compared with `model.generate` on the same work and with the bandwidth of the device's memory.

    python benchmarks/rollout.py                      # CPU: the embedded model, 64 rows x 48 tokens, one thread
    python benchmarks/rollout.py --device cuda        # the default where there is a GPU: SmolLM2, 64 rows x 128 tokens
    python benchmarks/rollout.py --roofline           # on a GPU, a random Llama of 1.2B parameters in bf16

Both sides sample every token of every row from the full distribution, and no row ends early. The sides take turns, so
that other load on the machine slows both. The table has two rows:

    write    as textgym's agents do: `collect` resets the environment, generates whole responses and submits them. No
             reward is computed, but texts are decoded, rows are scored and values are stored
    step     as a loop of another library does: `policy.act` and `envs.step`, token by token

    wall time ratio    median of the paired ratios, textgym / generate, with minimum and maximum
    environment        share of the environment in textgym's time, without loading prompts; measured in a separate run,
                       because on a GPU the measurement has to wait for the device
    FLOPs ratio        ratio of the counted floating-point operations

`--roofline` compares decoding with the memory bandwidth of the device, which it measures in the same process: the bytes
of weights and of cached keys and values that a step must read, divided by the time of a step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro
from measuring.episode_timing import Stopwatch, clocked, endless_prompts, step_through
from measuring.peers import Figures, count_flops, in_turns, report
from measuring.roofline import measure, random_llama

from textgym.agents.common.rollout import collect
from textgym.data.prompts import OPENINGS
from textgym.models.actor_critic import ActorCritic

BARS = {"cpu": 0.9, "cuda": 0.3}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "tiny", "new_tokens": 48, "hidden_size": 512, "layers": 8, "vocab_size": 32_000, "megabytes": 256},
    "cuda": {
        "model": "smollm2",
        "new_tokens": 128,
        "hidden_size": 2048,
        "layers": 16,
        "vocab_size": 128_000,
        "megabytes": 2048,
    },
}
"""Defaults by device."""


@dataclass
class Config:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: str = ""
    """Default: the embedded model on a CPU, "smollm2" on a GPU."""
    rows: int = 64
    prompt_tokens: int = 16
    new_tokens: int = 0
    """Default: 48 on a CPU, 128 on a GPU."""
    repeats: int = 9
    threads: int = 1
    roofline: bool = False
    """Compare decoding with the memory bandwidth of the device instead."""
    hidden_size: int = 0
    """Width of the roofline's random model; default: 512 on a CPU, 2048 on a GPU."""
    layers: int = 0
    """Layers of the roofline's random model; default: 8 on a CPU, 16 on a GPU."""
    vocab_size: int = 0
    """Vocabulary size of the roofline's random model; default: 32,000 on a CPU, 128,000 on a GPU."""
    megabytes: int = 0
    """Size of each of the three arrays of the bandwidth measurement; default: 256 on a CPU, 2048 on a GPU."""

    def __post_init__(self) -> None:
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, default in DEFAULTS[self.device].items():
            setattr(self, name, getattr(self, name) or default)


Play = Callable[[], Any]


def make_sides(config: Config) -> tuple[dict[str, Play], Play]:
    """Return textgym's ways to run an episode in every row, and `generate` on the same prompts."""
    policy = ActorCritic.from_pretrained(config.model, device=config.device)
    policy.seed(0)
    envs: Any = gym.make_vec(
        "textgym/Text-v0",
        num_envs=config.rows,
        prompts=endless_prompts(config.rows, OPENINGS.read_text().splitlines()),
        tokenizer=config.model,
        reward=lambda completions: [0.0] * len(completions),
        kl_mode="deferred",
        max_prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        min_new_tokens=config.new_tokens,
        device=config.device,
        autoreset_mode="Disabled",
        array="torch",
    )
    options = {"prompt_index": range(config.rows)}
    observation, _ = envs.reset(options=options)
    prompts = observation["input_ids"][:, : config.prompt_tokens]
    assert (observation["attention_mask"].sum(1) == config.prompt_tokens).all(), "prompts are cut to one length"

    def generate() -> None:
        policy.lm.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.new_tokens,
            min_new_tokens=config.new_tokens,
            pad_token_id=envs.unwrapped.pad_token_id,
        )

    ways = {"write": collect, "step": step_through}
    return {name: partial(way, envs, policy, options) for name, way in ways.items()}, generate


def compare(config: Config, flops: bool = True) -> Iterator[Figures]:
    """Yield the rows of the table, with the ratio of `flops` or without it."""
    ours, generate = make_sides(config)
    theirs, bar = count_flops(generate) if flops else 1, BARS[config.device]
    for name, play in ours.items():
        counted = partial(play, deterministic=True) if name == "write" else play  # captured steps are not counted
        ratio = {"FLOPs ratio": count_flops(counted) / theirs} if flops else {}
        for side in (play, play, generate):  # steps are captured when they run for the second time
            side()
        timed, *_ = in_turns(clocked(play), clocked(generate), config.repeats)
        watches = [Stopwatch().time(play) for _ in range(config.repeats)]
        yield {
            "ours": name,
            **{key.replace("peer's", "generate's"): figure for key, figure in timed.items()},
            "environment": statistics.median(w.environment / (w.environment + w.decode) for w in watches),
            **ratio,
            f"bar {bar}": "-" if name == "step" else "met" if timed["wall time ratio"] <= bar else "missed",
        }


def roofline(config: Config) -> Figures:
    """Return the row of the roofline table."""
    torch.manual_seed(0)
    lm = random_llama(config.hidden_size, config.layers, config.vocab_size, config.prompt_tokens + config.new_tokens)
    lm = lm.to(device=config.device, dtype=torch.bfloat16 if config.device == "cuda" else torch.float32)
    return measure(lm, config.rows, config.prompt_tokens, config.new_tokens, config.repeats, config.megabytes)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    report([roofline(config)] if config.roofline else compare(config))


if __name__ == "__main__":
    main(tyro.cli(Config))
