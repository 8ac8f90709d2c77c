"""A NaN or infinite loss or gradient never reaches the weights, and such weights never a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from textgym.agents import DQN, PPO
from textgym.agents.common.rollout_agent import RolloutAgent
from textgym.errors import NonFiniteError, TextgymError
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

REPLAY = {"learning_starts": 1, "gradient_steps": 1, "batch_size": 8}
AGENTS: dict[str, tuple[type[RolloutAgent], dict[str, Any]]] = {
    "ppo": (PPO, {"minibatch_size": 4}),
    "ppo, micro-batches": (PPO, {"minibatch_size": 4, "micro_batch_size": 2}),
    "dqn": (DQN, {**REPLAY, "backup": "soft"}),
}


def lengths(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def make_agent(name: str) -> RolloutAgent:
    kind, config = AGENTS[name]
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=8,
        prompts=["one", "three"],
        tokenizer=byte_tokenizer(),
        reward=lengths,
        kl_coef=0.02,
        kl_mode="deferred",
        max_new_tokens=4,
    )
    policy = ActorCritic.from_pretrained(mock_lm())
    return kind(policy, envs, kind.config_class(**{"episodes_per_update": 8, **config}))


def endless(loss: Tensor) -> Tensor:
    return loss * torch.inf


def not_a_number(loss: Tensor) -> Tensor:
    return loss * torch.nan


def steep(loss: Tensor) -> Tensor:
    """As large as it was, with a gradient that is no number."""
    return loss + (loss - loss).sqrt()


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize(("plant", "quantity"), [(endless, "loss"), (not_a_number, "loss"), (steep, "gradient norm")])
def test_a_step_that_is_not_finite_is_refused_and_the_weights_stay(
    name: str, plant: Any, quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent: Any = make_agent(name).learn(8)
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    plainly = agent.loss

    def planted(*arguments: Any) -> Any:
        loss, *rest = plainly(*arguments)
        return plant(loss), *rest

    monkeypatch.setattr(agent, "loss", planted)
    with pytest.raises(NonFiniteError, match=f"the {quantity} of update 2 is .*the weights are as they were") as raised:
        agent.learn(16)
    assert isinstance(raised.value, TextgymError)
    assert isinstance(raised.value, FloatingPointError)
    assert all(torch.equal(value, before[key]) for key, value in agent.policy.state_dict().items())
    assert agent.updates == 1

    monkeypatch.undo()  # and training can go on
    agent.learn(16)
    assert all(value.isfinite().all() for value in agent.policy.state_dict().values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_replace_no_checkpoint(value: float, tmp_path: Path) -> None:
    agent = make_agent("ppo")
    agent.save(tmp_path / "agent")
    saved = {path: path.read_bytes() for path in (tmp_path / "agent").rglob("*") if path.is_file()}
    with torch.no_grad():
        next(agent.policy.parameters()).view(-1)[0] = value
    with pytest.raises(NonFiniteError, match="has a NaN or infinite entry: nothing was saved"):
        agent.save(tmp_path / "agent", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "agent").rglob("*") if path.is_file()} == saved
