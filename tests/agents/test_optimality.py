"""Agents reach the optimum that enumeration knows; benchmarks/optimality.py has the long runs."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from textgym.agents import A2C, GRPO, NLPO, PPO, REINFORCE, RLOO
from textgym.models.actor_critic import ActorCritic
from textgym.testing import ExactTask, tolerance

TASK = ExactTask(vocab_size=8, horizon=3)
GROUPS = {"group_size": 16, "num_epochs": 2, "minibatch_size": 64}
PPO_SETTINGS = {"num_epochs": 2, "minibatch_size": 64, "value_coef": 0.5}


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "bar"),
    [
        (PPO, PPO_SETTINGS, 256, 0.99),
        (PPO, {**PPO_SETTINGS, "variant": "penalty"}, 256, 0.99),
        (NLPO, {**PPO_SETTINGS, "top_p": 1.0}, 256, 0.97),
        (GRPO, {**GROUPS, "loss_type": "dr_grpo", "scale": "none"}, 256, 0.99),
        (RLOO, GROUPS, 256, 0.99),
        (REINFORCE, {"baseline": "learned"}, 64, 0.97),
        (A2C, {}, 64, 0.97),
    ],
    ids=["ppo", "ppo-penalty", "nlpo", "grpo", "rloo", "reinforce", "a2c"],
)
def test_trap_40_the_learned_policy_is_the_closed_form(
    kind: Any, settings: dict[str, Any], rows: int, bar: float
) -> None:
    optimum = TASK.optimum(beta=1.0)
    envs = gym.make_vec("textgym/Text-v0", num_envs=rows, kl_mode="deferred", **TASK.env_kwargs(1.0))
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    assert optimum.gap_closed(TASK.log_probs(policy)) == pytest.approx(0.0, abs=tolerance(terms=1000))
    kind(policy, envs, kind.config_class(episodes_per_update=rows, learning_rate=0.05, **settings)).learn(25_600)
    log_probs = TASK.log_probs(policy)
    assert optimum.gap_closed(log_probs) >= bar
    assert np.abs(np.exp(log_probs) - optimum.probabilities).sum() < 0.15, "text by text, not in the mean alone"
