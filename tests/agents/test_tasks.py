"""PPO gets better at the tasks; benchmarks/tasks.py prints how much."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import pytest

from textgym.agents import PPO, PPOConfig
from textgym.agents.evaluation import generate, score_gains
from textgym.data.sources import FetchError
from textgym.models.actor_critic import ActorCritic
from textgym.registration import TASKS
from textgym.testing import mock_lm

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_ppo_improves_the_metric_of_a_toy_over_the_untrained_policy() -> None:
    """The whole interval of the paired gain is above 0, of a random model on `textgym/Enumerable-v0`."""
    envs = gym.make_vec("textgym/Enumerable-v0", 64, kl_mode="deferred", array="torch")
    policy = ActorCritic.from_pretrained(mock_lm(12, initializer_range=0.02))
    before = generate(policy, envs, [0] * 256, seed=1)
    PPO(policy, envs, PPOConfig(learning_rate=1e-3)).learn(2048)
    after = generate(policy, envs, [0] * 256, seed=1)
    (gain,) = score_gains(before, after, envs.unwrapped.metrics).values()
    assert gain.low > 0.1
    assert gain.value <= 1.0 - before.rollout.raw_scores.mean(), "no text scores above 1"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("tasks")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "Sentiment"])
def test_ppo_improves_the_metric_of_every_task_over_the_untrained_policy(benchmark: ModuleType, name: str) -> None:
    try:
        run = benchmark.run(name, benchmark.Config())
    except FetchError as error:
        pytest.skip(str(error))
    gains = run.gains("untrained")
    assert next(iter(gains.values())).low > 0, gains
