"""Cost per token of a rollout by context length, rows and vocabulary size, and the environment's share of it.

    python benchmarks/scaling.py

Random models with the shape of the embedded one (4 layers, 192 wide) and other vocabularies generate 32 tokens in every
row of a TextVectorEnv, after a prompt that fills the rest of the context. No row ends early, and the reward is free.
Only one dimension changes at a time. All settings run once per round, and the table has medians over rounds:

    us/token         CPU time of one thread in microseconds for each generated token, without encoding the prompt; as
                     agents do, that is, generate whole responses and submit them
    environment      share of `reset` and `submit` in it: ids, ends, texts and rewards; the tested limit is on this
    attention        share of attention over the context in it
    the rest         us/token without attention
    beside           "the rest" divided by that of the first row: the cache keeps it constant as the context grows
    step: ...        the same for a loop of another library, token by token, with `reset` and `step`, which also makes
                     observations
    MFLOPs/token     counted, by part: attention over the context, the output embedding, the other layers
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import gymnasium as gym
import torch
import tyro
from measuring.episode_timing import Stopwatch, step_through
from measuring.peers import Figures, report
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import textgym
from textgym.agents.common.rollout import collect
from textgym.models.machine.flops import FlopCount
from textgym.models.machine.profiled_phases import phase

SHARE_BAR, BIG = 0.05, 64
"""Limit of the environment's share in a rollout, and the number of rows from which it applies."""


@dataclass
class Config:
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024)
    rows: tuple[int, ...] = (1, 4, 16, 64, 256)
    vocab_sizes: tuple[int, ...] = (2_000, 10_000, 50_000, 150_000)
    base: tuple[int, int, int] = (64, 64, 2_000)
    """Context length, rows and vocabulary size while another dimension changes."""
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
        # The tokenizer has one token more than the model: EOS, which is never sampled, so that no row ends early.
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
            kl_mode="deferred",
            autoreset_mode="Disabled",
            array="torch",
        )

    def play(self, way: Callable[[Any, Any], Any]) -> Figures:
        """Generate all tokens; return CPU microseconds per token, in total and by part."""
        self.policy.reset_cache()
        with marked_attention():
            watch = Stopwatch(time.process_time).time(partial(way, self.envs, self.policy))
        decode, attention = (seconds / (self.new_tokens - 1) for seconds in (watch.decode, watch.attention))
        environment = watch.environment / self.new_tokens
        cost = decode + environment
        return {
            "us/token": cost / self.rows * 1e6,
            "environment": environment / cost,
            "attention": attention / cost,
            "the rest": (cost - attention) / self.rows * 1e6,
        }

    def flops(self) -> dict[str, float]:
        """Return the operations for the last token of a row, at full context length."""
        self.policy.reset_cache()
        observation, _ = self.envs.reset(seed=0)
        for _ in range(self.new_tokens - 1):
            observation, *_ = self.envs.step(self.policy.act(observation).action)
        with FlopCount() as count:
            self.policy.act(observation)
        total = count.total / self.rows
        attention = sum(n for name, n in count.by_operation.items() if "attention" in name) / self.rows
        head = 2.0 * self.policy.head.weight.numel()
        return {"attention": attention, "head": head, "layers": total - attention - head}


@contextmanager
def marked_attention() -> Iterator[None]:
    """Make attention a phase of its own, in a block."""
    attend = functional.scaled_dot_product_attention

    def marked(*args: Any, **kwargs: Any) -> Any:
        with phase("attention"):
            return attend(*args, **kwargs)

    with mock.patch.object(functional, "scaled_dot_product_attention", marked):
        yield


def measure(settings: list[tuple[int, int, int]], config: Config) -> list[Figures]:
    """Return the rows of one table."""
    rollouts = [Rollout(*setting, config.new_tokens) for setting in settings]
    rounds = [[(x.play(collect), x.play(step_through)) for x in rollouts] for _ in range(1 + config.repeats)]
    table: list[Figures] = []
    for rollout, played in zip(rollouts, zip(*rounds[1:], strict=True), strict=True):
        writes, steps = (medians(plays) for plays in zip(*played, strict=True))
        row: Figures = {**rollout.setting, **writes}
        row["beside"] = row["the rest"] / (table[0] if table else row)["the rest"]
        row |= {f"step: {name}": steps[name] for name in ("us/token", "environment")}
        row |= {f"MFLOPs/token: {name}": count / 1e6 for name, count in rollout.flops().items()}
        within = row["environment"] < SHARE_BAR
        row[f"bar {SHARE_BAR}"] = "-" if rollout.rows < BIG else "met" if within else "missed"
        table.append(row)
    return table


def medians(plays: tuple[Figures, ...]) -> Figures:
    """Return the median of each metric."""
    return {name: statistics.median(play[name] for play in plays) for name in plays[0]}


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
