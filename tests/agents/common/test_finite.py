"""A NaN or infinite loss or gradient never reaches the weights, and such weights never a checkpoint."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from textgym.agents import DQN, PPO, SFT, SFTConfig
from textgym.agents.common.rollout_agent import RolloutAgent
from textgym.errors import NonFiniteError, TextgymError
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.finite import MOST_SKIPPED, OF_STEPS, FiniteSteps
from textgym.testing import byte_tokenizer, mock_lm

REPLAY = {"learning_starts": 1, "gradient_steps": 1, "batch_size": 8}
AGENTS: dict[str, tuple[type[RolloutAgent], dict[str, Any]]] = {
    "ppo": (PPO, {"minibatch_size": 4}),
    "ppo, micro-batches": (PPO, {"minibatch_size": 4, "micro_batch_size": 2}),
    "dqn": (DQN, {**REPLAY, "backup": "soft"}),
}


def lengths(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def make_agent(name: str, **options: Any) -> RolloutAgent:
    kind, config = {**AGENTS, "dqn, by surprise": (DQN, {**REPLAY, "backup": "soft", "prioritised": True})}[name]
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
    return kind(policy, envs, kind.config_class(**{"episodes_per_update": 8, **config, **options}))


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


# --- on_nonfinite="skip" ---


def make_sft(**config: Any) -> SFT:
    rows = [{"prompt": f"{i} is", "completion": f" {i}"} for i in range(16)]
    return SFT(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), SFTConfig(batch_size=2, **config))


def plant_in(agent: Any, steps: set[int], monkeypatch: pytest.MonkeyPatch, plant: Any = not_a_number) -> None:
    """Make the loss of some of the steps not finite; each calls it once."""
    plainly, calls = agent.loss, itertools.count()

    def planted(*arguments: Any) -> Any:
        loss, *rest = plainly(*arguments)
        return plant(loss) if next(calls) in steps else loss, *rest

    monkeypatch.setattr(agent, "loss", planted)


@pytest.mark.parametrize("name", ["ppo", "dqn", "dqn, by surprise"])
@pytest.mark.parametrize("plant", [not_a_number, *(pytest.param(p, marks=pytest.mark.slow) for p in (endless, steep))])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    name: str, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent: Any = make_agent(name, on_nonfinite="skip")
    plant_in(agent, {0}, monkeypatch, plant)
    reports: list[dict[str, float]] = []
    agent.learn(16, [lambda agent, metrics: reports.append(metrics)])
    assert agent.updates == 2
    assert [report["val/skipped_steps"] for report in reports] == [1, 1]
    assert all(value.isfinite().all() for value in agent.policy.state_dict().values())
    assert all(math.isfinite(value) for report in reports for value in report.values())
    assert "val/grad_norm" in reports[1]
    if name == "dqn, by surprise":
        assert agent.memory.alpha > 0
        assert all(values.isfinite().all() for values in agent.memory.tensors.values() if values.is_floating_point())


def test_a_skipped_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    agent: Any = make_agent("ppo", on_nonfinite="skip")
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    plant_in(agent, set(range(8)), monkeypatch)
    agent.learn(8)
    assert all(torch.equal(value, before[key]) for key, value in agent.policy.state_dict().items())
    assert not agent.optimizer.state


def test_sft_skips_a_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_sft(on_nonfinite="skip", max_steps=3)
    plant_in(agent, {1}, monkeypatch)
    reports: list[dict[str, float]] = []
    agent.learn([lambda agent, metrics: reports.append(metrics)])
    assert [report["val/skipped_steps"] for report in reports] == [0, 1, 1]
    assert ["grad_norm" in report for report in reports] == [True, False, True]
    assert all(value.isfinite().all() for value in agent.policy.state_dict().values())
    refuses = make_sft(max_steps=3)
    plant_in(refuses, {1}, monkeypatch)
    with pytest.raises(NonFiniteError, match="the gradient norm of step 2 is nan"):
        refuses.learn()


def test_too_many_skipped_steps_end_the_run() -> None:
    steps, good, bad = FiniteSteps("skip"), {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(torch.nan)}
    for _ in range(MOST_SKIPPED):
        assert not steps.allow("update 1", bad)
        assert steps.allow("update 1", good)
    with pytest.raises(NonFiniteError, match=r"more than 10 of the last 21 steps were skipped .* the loss of update 9"):
        steps.allow("update 9", bad)
    later = FiniteSteps("skip")
    for _ in range(5):
        for _ in range(MOST_SKIPPED):
            later.allow("update 1", bad)
        for _ in range(OF_STEPS):
            later.allow("update 1", good)
    assert later.skipped == 5 * MOST_SKIPPED, "what is long ago does not count"


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_kl_that_is_not_finite_ends_the_run(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would reach the coefficient of the penalty, which no later update could mend."""
    agent: Any = make_agent("ppo", on_nonfinite=mode)
    monkeypatch.setattr(agent, "measure_kl", lambda rollout: torch.full_like(rollout.log_probs, torch.nan))
    with pytest.raises(NonFiniteError, match="the KL to the reference of update 1 is nan"):
        agent.learn(8)
    assert math.isfinite(agent.penalty.coef)
