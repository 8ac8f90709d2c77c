"""Steps of 16-bit weights that are lost to rounding are measured and said."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.agents.common.optimizer import adamw
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm


def checksums(completion_ids: list[list[int]]) -> list[float]:
    """Scores that differ, so that there is something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def learn(agent: str, dtype: torch.dtype) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1), dtype=dtype)
    if agent == "sft":
        rows = [{"prompt": "a", "completion": "bcd"}] * 4
        SFT(policy, rows, byte_tokenizer(), SFTConfig(batch_size=4, max_steps=2, learning_rate=1e-5)).learn()
        return
    settings: dict[str, Any] = {"prompts": ["abc"], "tokenizer": byte_tokenizer(), "max_new_tokens": 4}
    envs = gym.make_vec("textgym/Text-v0", 4, reward=checksums, **settings)
    PPO(policy, envs, PPOConfig(episodes_per_update=4, learning_rate=1e-5)).learn(8)


@pytest.mark.parametrize("agent", ["sft", "ppo"])
def test_bfloat16_weights_that_hardly_change_are_warned_of_once(agent: str) -> None:
    with pytest.warns(UserWarning, match=r"weights are torch.bfloat16, and the first step changed \d+% of") as caught:
        learn(agent, torch.bfloat16)
    assert len([warning for warning in caught if "lost to rounding" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lost to rounding")
        learn(agent, torch.float32)


def test_the_share_is_that_of_the_weights_with_a_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor([1e-3, 1.0, 1.0, 1.0, 5.0], dtype=torch.bfloat16))
    optimizer = adamw([weight], learning_rate=1e-3, epsilon=1e-8, eight_bit=False)
    weight.grad = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="changed 25% of those"):
        optimizer.step()


def after_a_silent_step(learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser of eight weights of 1 after a step, of which nothing was said."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = adamw([weight], learning_rate=learning_rate, epsilon=1e-8, eight_bit=False)
    weight.grad = torch.ones_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    return optimizer


def test_large_steps_of_bfloat16_weights_are_not_warned_of() -> None:
    after_a_silent_step(learning_rate=0.1)


def test_the_first_step_with_a_learning_rate_is_measured() -> None:
    """A warm-up begins with a rate of 0, at which no weight changes."""
    optimizer = after_a_silent_step(learning_rate=0.0)
    optimizer.param_groups[0]["lr"] = 1e-4
    with pytest.warns(UserWarning, match="changed 0% of those"):
        optimizer.step()
