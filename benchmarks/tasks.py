"""Every task: PPO with the embedded model, and its metric on held-out prompts before and after, with 95% intervals.

    python benchmarks/tasks.py                                   # all tasks, a few minutes each on one thread
    python benchmarks/tasks.py --tasks Copy Answer --minutes 1

Prompts to train on are those of the split `train`, prompts to measure on the first 128 of `test`; tasks whose prompt
does not count have no splits. `textgym/Enumerable-v0` has a vocabulary of its own and starts from a random model of 12
tokens. A task whose text was not fetched yet fetches it first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro

from textgym.agents import PPO, PPOConfig
from textgym.agents.evaluation import generate, score_intervals
from textgym.envs.tasks.enumerable import VOCAB_SIZE
from textgym.models.actor_critic import ActorCritic
from textgym.registration import TASKS
from textgym.testing import mock_lm

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ReasoningGym": {"task": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
    "Enumerable": {"reference": mock_lm(VOCAB_SIZE, initializer_range=0.02)},
}

WITHOUT_SPLITS = ("IncreasingNumbers", "Dates", "Enumerable")


@dataclass
class Config:
    """What is run."""

    tasks: tuple[str, ...] = tuple(name for name in TASKS if name != "Sentiment")
    """Names of tasks; `textgym demo` is that of the sentiment task."""
    minutes: float = 3.0
    """Of training, for each task."""
    learning_rate: float = 3e-4
    """Of PPO."""
    seed: int = 0
    """Of everything."""


def run(name: str, config: Config) -> None:
    """Trains on a task and prints a row for each of its metrics."""
    env_id, shared = f"textgym/{name}-v0", {"kl_mode": "deferred", "array": "torch", **ARGUMENTS.get(name, {})}
    train, test = (
        gym.make_vec(env_id, 64, **shared, **({"split": split} if name not in WITHOUT_SPLITS else {}))
        for split in ("train", "test")
    )
    start = mock_lm(VOCAB_SIZE, initializer_range=0.02) if name == "Enumerable" else "tiny"  # references are frozen
    policy = ActorCritic.from_pretrained(start)
    prompts = [i % len(test.unwrapped.task.rows) for i in range(128)]
    metrics = test.unwrapped.metrics
    before = score_intervals(generate(policy, test, prompts, config.seed), metrics)
    deadline = time.monotonic() + 60 * config.minutes
    agent = PPO(policy, train, PPOConfig(seed=config.seed, learning_rate=config.learning_rate))
    agent.learn(10**6, [lambda *_: time.monotonic() < deadline])
    after = score_intervals(generate(policy, test, prompts, config.seed), metrics)
    for metric in before:
        print(f"| {name} | {metric} | {before[metric]} | {after[metric]} | {agent.episodes} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = tyro.cli(Config)
    print("| task | metric | before | after | episodes |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in config.tasks:
        run(name, config)
