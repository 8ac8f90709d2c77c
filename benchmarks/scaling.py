"""Cost per token of a rollout, by context length, rows and vocabulary; and the environment's share of it.

    python benchmarks/scaling.py

Random models of the embedded one's shape (4 layers, 192 wide) with other vocabularies write 32 tokens in every row of a
TextVectorEnv, after a prompt that fills the rest of the context; no row ends early, and the reward costs nothing. One
dimension changes at a time. All settings run once a round, and medians over rounds are printed:

    us/token         CPU time of one thread, in microseconds for each token written, without the pass over the prompt
    environment      share of that spent in `step`: ids, ends, observations, texts and rewards
    MFLOPs/token     counted, by what they go to: attention over the context, the output embedding, the other layers
    beside           us/token over that of the first row of the table

FLOPs without attention do not grow with the context: that is what a cache is for.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro
from peers import Figures, report
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import textgym

SHARE_BAR, BIG = 0.05, 64
"""The environment's share of a rollout of so many rows or more."""


@dataclass
class Config:
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024)
    rows: tuple[int, ...] = (1, 4, 16, 64, 256)
    vocab_sizes: tuple[int, ...] = (2_000, 10_000, 50_000, 150_000)
    base: tuple[int, int, int] = (64, 64, 2_000)
    """Context, rows and vocabulary where another dimension changes."""
    new_tokens: int = 32
    repeats: int = 5


class Rollout:
    """One setting: a policy and its environment."""

    def __init__(self, context: int, rows: int, vocab_size: int, new_tokens: int) -> None:
        self.rows, self.new_tokens = rows, new_tokens
        self.setting = {"context": context, "rows": rows, "vocabulary": vocab_size}
        shape = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=416,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=context,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        self.policy = textgym.ActorCritic.from_pretrained(LlamaForCausalLM(shape))
        self.policy.seed(0)
        # The tokenizer knows one token more than the model: EOS, which is never drawn, so that no row ends early.
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size + 1)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        prompt_tokens = context - new_tokens
        self.envs: Any = gym.make_vec(
            "textgym/Text-v0",
            num_envs=rows,
            prompts=[" ".join(f"w{row + i}" for i in range(prompt_tokens)) for row in range(rows)],
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{vocab_size}", pad_token="w0"),
            reward=lambda completions: [0.0] * len(completions),
            max_prompt_tokens=prompt_tokens,
            max_new_tokens=new_tokens,
            autoreset_mode="Disabled",
            array="torch",
        )

    def play(self) -> tuple[float, float]:
        """Writes all tokens; CPU seconds of all but the first, and those of them that the environment took."""
        self.policy.reset_cache()
        observation, _ = self.envs.reset(seed=0)
        observation, *_ = self.envs.step(self.policy.act(observation).action)
        started, env_seconds = time.process_time(), 0.0
        for _ in range(self.new_tokens - 1):
            action = self.policy.act(observation).action
            before = time.process_time()
            observation, *_ = self.envs.step(action)
            env_seconds += time.process_time() - before
        return time.process_time() - started, env_seconds

    def flops(self) -> dict[str, float]:
        """Of the last token of a row, at the full context."""
        self.policy.reset_cache()
        observation, _ = self.envs.reset(seed=0)
        for _ in range(self.new_tokens - 1):
            observation, *_ = self.envs.step(self.policy.act(observation).action)
        with FlopCounterMode(display=False) as counter:
            self.policy.act(observation)
        by_operation = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        total = sum(by_operation.values()) / self.rows
        attention = sum(n for name, n in by_operation.items() if "attention" in name or "bmm" in name) / self.rows
        head = 2.0 * self.policy.head.weight.numel()
        return {"attention": attention, "head": head, "layers": total - attention - head}


def measure(settings: list[tuple[int, int, int]], config: Config) -> list[Figures]:
    """One table."""
    rollouts = [Rollout(*setting, config.new_tokens) for setting in settings]
    for rollout in rollouts:
        rollout.play()
    rounds = [[rollout.play() for rollout in rollouts] for _ in range(config.repeats)]
    table: list[Figures] = []
    for rollout, times in zip(rollouts, zip(*rounds, strict=True), strict=True):
        tokens = rollout.rows * (config.new_tokens - 1)
        cost = statistics.median(seconds for seconds, _ in times) / tokens * 1e6
        share = statistics.median(env / seconds for seconds, env in times)
        row: Figures = {**rollout.setting, "us/token": cost, "environment": share}
        row |= {f"MFLOPs/token: {name}": count / 1e6 for name, count in rollout.flops().items()}
        row["beside"] = cost / (table[0]["us/token"] if table else cost)
        row["bar"] = ("met" if share < SHARE_BAR else "missed") if rollout.rows >= BIG else "-"
        table.append(row)
    return table


def main(config: Config) -> None:
    torch.set_num_threads(1)
    context, rows, vocab_size = config.base
    for title, settings in (
        ("Context length", [(length, rows, vocab_size) for length in config.contexts]),
        ("Rows", [(context, count, vocab_size) for count in config.rows]),
        ("Vocabulary", [(context, rows, size) for size in config.vocab_sizes]),
    ):
        print(f"\n{title}\n")
        report(measure(settings, config))


if __name__ == "__main__":
    main(tyro.cli(Config))
