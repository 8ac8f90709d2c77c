"""A2C and REINFORCE by hand: estimators of the advantages, and the weights of the parts of their losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents import A2C, REINFORCE, A2CConfig, REINFORCEConfig
from textgym.agents.common.policy_gradient import Batch
from textgym.agents.common.rollout import collect
from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.testing import byte_tokenizer, mock_lm

MASK = torch.tensor([[True, True, False], [True, False, False]])


def loss_of(kind: Any, config: Any) -> torch.Tensor:
    """Loss of two episodes with values 2 and 3 above their returns, an entropy of 1 a token, and no advantages."""
    agent = kind.__new__(kind)  # the loss needs no policy and no environment
    agent.config = config
    zeros = torch.zeros(2, 3)
    values = torch.tensor([[2.0, 2.0, torch.nan], [3.0, torch.nan, torch.nan]], requires_grad=True)
    new = Evaluation(zeros, values, torch.where(MASK, 1.0, torch.nan))
    batch = Batch(SimpleNamespace(response_mask=MASK), zeros, zeros, zeros, zeros, torch.arange(2))  # type: ignore[arg-type]
    loss: torch.Tensor = agent.loss(new, batch)[0]
    if loss.requires_grad:
        assert torch.autograd.grad(loss, values)[0].isfinite().all()
    return loss


@pytest.mark.parametrize(("kind", "config_class"), [(A2C, A2CConfig), (REINFORCE, REINFORCEConfig)])
@pytest.mark.parametrize("value_coef", [0.0, 0.3, 2.0])
def test_the_value_loss_has_its_weight(kind: Any, config_class: Any, value_coef: float) -> None:
    """(2^2 + 2^2 + 3^2) / 2 over two episodes."""
    settings = {"baseline": "learned"} if kind is REINFORCE else {}
    assert loss_of(kind, config_class(value_coef=value_coef, **settings)).item() == pytest.approx(value_coef * 17 / 4)


@pytest.mark.parametrize(("kind", "config_class"), [(A2C, A2CConfig), (REINFORCE, REINFORCEConfig)])
def test_the_entropy_bonus_has_its_weight(kind: Any, config_class: Any) -> None:
    """Three tokens over two episodes."""
    settings = {"value_coef": 0.0} if kind is A2C else {}
    assert loss_of(kind, config_class(entropy_coef=0.2, **settings)).item() == pytest.approx(-0.2 * 3 / 2)


@pytest.mark.parametrize("kind", [A2C, REINFORCE])
def test_defaults_of_the_value_loss(kind: Any) -> None:
    assert kind.config_class().value_coef == 0.5


def test_without_a_learned_baseline_there_is_no_value_loss() -> None:
    assert loss_of(REINFORCE, REINFORCEConfig(baseline="mean")).item() == 0.0


VALUES, REWARDS = (1.0, 2.0, 4.0), (0.5, 0.25, 3.0)
GAMMA = 0.5
ERRORS = (0.5 + GAMMA * 2 - 1, 0.25 + GAMMA * 4 - 2, 3.0 - 4)  # r + gamma V' - V


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"estimator": "td"}, ERRORS),
        (
            {"estimator": "n_step", "n_steps": 2},
            (0.5 + GAMMA * 0.25 + GAMMA**2 * 4 - 1, 0.25 + GAMMA * 3 - 2, 3.0 - 4),
        ),
        (
            {"estimator": "gae", "lam": 0.8},
            (
                ERRORS[0] + GAMMA * 0.8 * (ERRORS[1] + GAMMA * 0.8 * ERRORS[2]),
                ERRORS[1] + GAMMA * 0.8 * ERRORS[2],
                ERRORS[2],
            ),
        ),
    ],
    ids=["td", "n steps", "gae"],
)
def test_each_estimator_of_a2c_is_the_one_that_it_names(settings: dict[str, Any], expected: tuple[float, ...]) -> None:
    envs = gym.make_vec(
        "textgym/Text-v0",
        4,
        prompts=["a"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [0.0] * len(completions),
        max_new_tokens=3,
        min_new_tokens=3,
    )
    config = A2CConfig(episodes_per_update=4, gamma=GAMMA, normalise_values=False, **settings)
    agent: Any = A2C(ActorCritic.from_pretrained(mock_lm(num_layers=1)), envs, config)
    rollout = collect(envs, agent.policy)
    rollout.values[:] = torch.tensor(VALUES)
    rollout.rewards[:] = torch.tensor(REWARDS)
    seen: list[torch.Tensor] = []
    agent.minibatches = lambda _, advantages, returns: seen.extend((advantages, returns)) or iter(())
    agent.update(rollout, torch.zeros_like(rollout.log_probs))
    assert seen[0][0].tolist() == pytest.approx(expected)
    assert seen[1][0].tolist() == pytest.approx([a + v for a, v in zip(expected, VALUES, strict=True)])
