"""A machine with two GPUs: an agent learns on the one that it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from textgym.agents import PPO

pytestmark = pytest.mark.usefixtures("two_gpus", "the_cpus_numbers")


def test_an_agent_learns_on_the_second_gpu(
    tiny_policy: Callable[..., Any], text_envs: Callable[..., Any], same: Callable[..., None]
) -> None:
    seen: dict[str, list[dict[str, float]]] = {"cuda:1": [], "cpu": []}
    for device, metrics in seen.items():
        config = PPO.config_class(episodes_per_update=4, minibatch_size=4, num_epochs=1)
        agent = PPO(tiny_policy(device), text_envs(device, min_new_tokens=4), config)
        agent.learn(12, [lambda agent, given, metrics=metrics: metrics.append(given)])
        assert agent.policy.device == torch.device(device)
    names = ("objective/entropy", "objective/scores", "val/grad_norm")
    same(*([{name: row[name] for name in names} for row in metrics] for metrics in seen.values()))
