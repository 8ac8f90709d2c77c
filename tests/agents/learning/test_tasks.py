"""PPO gets better at the tasks; benchmarks/learning/tasks.py prints how much."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.evaluation import generate, score_gains
from textgym.data.corpora.sources import FetchError
from textgym.models.actor_critic import ActorCritic
from textgym.registration import TASKS
from textgym.testing import Measured, assert_learns, mock_lm


def gain_of(seed: int, learning_rate: float = 3e-3) -> float:
    """How much better a random model does on `textgym/Enumerable-v0`, by 256 texts before and after."""
    envs = gym.make_vec("textgym/Enumerable-v0", 128, kl_mode="deferred", array="torch")
    policy = ActorCritic.from_pretrained(mock_lm(12, num_layers=1, initializer_range=0.02))
    before = generate(policy, envs, [0] * 256, seed=seed)
    config = PPOConfig(num_epochs=2, minibatch_size=64, learning_rate=learning_rate, seed=seed)
    PPO(policy, envs, config).learn(128 * 8)
    after = generate(policy, envs, [0] * 256, seed=seed)
    (gain,) = score_gains(before, after, envs.unwrapped.metrics).values()
    assert gain.value <= 1.0 - before.rollout.raw_scores.mean(), "no text scores above 1"
    return gain.value


@pytest.mark.slow
def test_ppo_improves_the_metric_of_a_toy_over_the_untrained_policy() -> None:
    """A false failure has a chance of 5e-5."""
    gains = [gain_of(seed) for seed in range(3)]
    assert_learns(gains, at_least=0.05, measured=Measured(mean=0.323, standard_deviation=0.035, runs=6))


@pytest.mark.slow
def test_ppo_that_does_not_learn_improves_no_metric() -> None:
    """The same model writes the same texts for the same seed."""
    assert gain_of(0, learning_rate=0.0) == 0.0


FEW_PROMPTS = ("Answer", "ReasoningGym")
"""Of 25 and 36 held-out prompts no gain can be seen: the embedded model learns the sums of `train` by heart."""
CLEAREST = {"Translate": "Chrf"}
"""The metric to look at where it is not the first: on 256 translations the gain of Bleu is 3.5 times its standard
error, and that of Chrf 12 times."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("Sentiment", *FEW_PROMPTS)])
def test_ppo_improves_the_metric_of_every_task_over_the_untrained_policy(benchmark: Any, name: str) -> None:
    """The gains in docs/tasks.md are at least 6 standard errors of the evaluation.

    So other texts in the evaluation fail it with a chance of 2e-5. Training has one seed, since a run takes minutes. A
    policy that does not move writes the same texts, and gains exactly 0.
    """
    module = benchmark("tasks")
    try:
        run = module.run(name, module.Config())
    except FetchError as error:
        pytest.skip(str(error))
    gains = run.gains("untrained")
    assert gains[CLEAREST.get(name, next(iter(gains)))].low > 0, gains
