"""Optimisers of torch, weight decay, and schedules of the learning rate."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym import agents
from textgym.agents import GRPO, GRPOConfig, PPOConfig
from textgym.agents.common import optimizer
from textgym.agents.common.optimizer import PartSettings, make_optimizer
from textgym.agents.common.rollout_agent import RolloutAgentConfig
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm


def checksums(completion_ids: list[list[int]]) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_agent(**config: Any) -> GRPO:
    settings: dict[str, Any] = {"prompts": ["one", "two"], "tokenizer": byte_tokenizer(), "max_new_tokens": 4}
    envs = gym.make_vec("textgym/Text-v0", 8, reward=checksums, **settings)
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1))
    return GRPO(policy, envs, GRPOConfig(episodes_per_update=8, group_size=4, **config))


@pytest.mark.parametrize(
    "name",
    ["SGD", "NAdam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("AdamW", "Adam", "RMSprop", "Adagrad"))],
)
def test_any_optimiser_of_torch_trains(name: str) -> None:
    agent = make_agent(optimizer=name, learning_rate=0.01)
    before = {key: weight.clone() for key, weight in agent.policy.lm.state_dict().items()}
    agent.learn(8)
    assert type(agent.optimizer) is getattr(torch.optim, name)
    assert any(not torch.equal(weight, before[key]) for key, weight in agent.policy.lm.state_dict().items())


def test_a_step_of_sgd_is_the_clipped_gradient_times_the_learning_rate() -> None:
    agent = make_agent(optimizer="SGD", learning_rate=0.5, max_grad_norm=0.1)
    before = [weight.detach().clone() for weight in agent.policy.parameters()]
    agent.learn(8)
    moved = torch.cat(
        [(old - new).detach().flatten() for old, new in zip(before, agent.policy.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(0.5 * 0.1, rel=1e-3)


def test_moments_in_8_bits_are_for_weights_that_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "eight_bit_adamw", lambda: torch.optim.NAdam)  # in place of bitsandbytes
    assert isinstance(make_agent(adam_8bit=True).optimizer, torch.optim.NAdam)


def test_options_reach_the_optimiser() -> None:
    group = make_agent(optimizer="SGD", optimizer_options={"momentum": 0.9}, weight_decay=0.01).optimizer.param_groups[
        0
    ]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.01)
    with pytest.raises(TypeError, match="momentun"):
        make_agent(optimizer="SGD", optimizer_options={"momentun": 0.9})


def test_weight_decay_shrinks_the_weights() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    config = RolloutAgentConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer({"policy": [weight]}, {"policy": PartSettings(0.1, 0.5, 1.0)}, config)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.95] * 3)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"anneal_learning_rate": False}, [1.0, 1.0, 1.0, 1.0]),
        pytest.param({"warmup": 1.0}, [0.25, 0.5, 0.75, 1.0], marks=pytest.mark.slow),
        ({"annealing": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"warmup": 0.5}, [0.5, 1.0, 1.0, 0.5]),
        pytest.param({"warmup": 0.25, "anneal_learning_rate": False}, [1.0, 1.0, 1.0, 1.0], marks=pytest.mark.slow),
    ],
)
def test_schedules_of_the_learning_rate(settings: dict[str, Any], rates: list[float]) -> None:
    """No update has a learning rate of 0."""
    seen: list[float] = []
    make_agent(learning_rate=1.0, optimizer="SGD", max_grad_norm=1e-6, **settings).learn(
        32, [lambda _, metrics: seen.append(metrics["lr"])]
    )
    assert seen == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("name", ["LBFGS", "Optimizer", "adamw", "nn", "lr_scheduler"])
def test_what_is_no_optimiser_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer must be the name of a class of torch.optim, other than LBFGS"):
        PPOConfig(optimizer=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam_8bit": True, "optimizer": "SGD"}, "adam_8bit=True cannot be used with optimizer='SGD'"),
        (
            {"anneal_learning_rate": False, "annealing": "cosine"},
            "annealing='cosine' cannot be used with anneal_learning_rate=False",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    for config_class in (agents.PPOConfig, agents.GRPOConfig, agents.DQNConfig):
        with pytest.raises(ValueError, match=message):
            config_class(**settings)
