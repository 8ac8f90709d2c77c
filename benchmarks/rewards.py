"""Cost of rewards: the share of scoring in the time of a PPO iteration, and the padding in reward-model batches.

    python benchmarks/rewards.py                        # some minutes on one CPU thread
    python benchmarks/rewards.py --episodes 512

One PPO iteration with the embedded model collects `episodes` completions of 48 tokens and trains on them. The rewards
are a Python function for whole texts and one for each token. The time of decoding texts and of calling both functions
is measured within the same iteration. Padding is counted over the same number of completions of free length.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro

import textgym  # noqa: F401  (registers the ids)
from textgym import ActorCritic, RewardModel
from textgym.agents import PPO, PPOConfig
from textgym.agents.common.rollout import collect
from textgym.models.architectures.attention import batches_by_length


@dataclass
class Args:
    episodes: int = 4096
    """Number of completions in the iteration."""
    num_envs: int = 256
    """Number of rows of the environment."""
    new_tokens: int = 48
    """Number of tokens of each completion."""


def words(completions: list[str]) -> list[float]:
    return [-abs(len(text.split()) - 20.0) for text in completions]


def repeats(completion_ids: list[list[int]]) -> list[list[float]]:
    return [[-float(token in ids[:place]) for place, token in enumerate(ids)] for ids in completion_ids]


def make_envs(args: Args, **changes: Any) -> Any:
    settings = {"reward": [words, repeats], "kl_mode": "deferred", "max_new_tokens": args.new_tokens, **changes}
    return gym.make_vec("textgym/Sentiment-v0", num_envs=args.num_envs, array="torch", **settings)


class Timer:
    """Measures the total wall time of the calls of a function."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds, self.rows = function, 0.0, 0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - start
        self.rows += len(arguments[0])
        return result


def scoring_share(args: Args) -> None:
    envs = make_envs(args, min_new_tokens=args.new_tokens)
    task = envs.unwrapped.task
    decoding, scoring = Timer(task.finished), Timer(task.scorer)
    task.finished, task.scorer = decoding, _Scorer(task.scorer, scoring)
    agent = PPO(ActorCritic.from_pretrained("tiny"), envs, PPOConfig(episodes_per_update=args.episodes))
    start = time.perf_counter()
    agent.learn(args.episodes)
    total = time.perf_counter() - start
    assert scoring.rows == args.episodes
    print(f"one PPO iteration, {args.episodes} x {args.new_tokens} tokens: {total:.1f} s")
    print(f"  two reward functions, one of them token-level: {scoring.seconds:.3f} s, {scoring.seconds / total:.2%}")
    print(f"  decoding the texts for them:                   {decoding.seconds:.3f} s, {decoding.seconds / total:.2%}")


class _Scorer:
    """A scorer whose calls are timed."""

    def __init__(self, scorer: Any, timer: Timer) -> None:
        self.scorer, self.timer = scorer, timer

    def __call__(self, finished: Any) -> Any:
        return self.timer(finished)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)


def padding_share(args: Args) -> None:
    model = RewardModel.from_pretrained("tiny")
    envs, policy = make_envs(args), ActorCritic.from_pretrained("tiny")
    lengths: list[int] = []
    while len(lengths) < args.episodes:
        lengths += collect(envs, policy).sequences.lengths.tolist()
    rows = [[0] * length for length in lengths[: args.episodes]]
    batches = batches_by_length([len(row) for row in rows], model.batch_size)
    shares = [1 - sum(len(rows[i]) for i in b) / (len(b) * max(len(rows[i]) for i in b)) for b in batches]
    total = sum(len(row) for row in rows)
    slots = sum(len(b) * max(len(rows[i]) for i in b) for b in batches)
    print(f"reward-model batches of {len(rows)} texts of {min(lengths)} to {max(lengths)} tokens: {len(batches)}")
    print(f"  padding: {1 - total / slots:.2%} of all slots, at most {max(shares):.2%} of a batch")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    padding_share(args)
    scoring_share(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
