"""A run plays as many episodes as were asked for: its last update is smaller if updates do not divide them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym.agents import (
    A2C,
    DQN,
    GRPO,
    NLPO,
    PPO,
    REINFORCE,
    RLOO,
    ExpertIteration,
    OnlineDPO,
    Pathwise,
)
from textgym.agents.common import rollout_agent
from textgym.agents.common.rollout import Rollout
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import byte_tokenizer, mock_lm

GROUPS = {"group_size": 4}
REPLAY = {"learning_starts": 8, "batch_size": 4, "gradient_steps": 1}
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (PPO, {"minibatch_size": 4}),
    "grpo": (GRPO, GROUPS),
    "dqn": (DQN, REPLAY),
    "reinforce": (REINFORCE, {}),
    "reinforce, learned": (REINFORCE, {"baseline": "learned"}),
    "a2c": (A2C, {}),
    "nlpo": (NLPO, {"minibatch_size": 4}),
    "dapo": (GRPO, {**GROUPS, "dynamic_sampling": 2}),
    "rloo": (RLOO, {**GROUPS, "normalise": "batch"}),
    "expert iteration": (ExpertIteration, GROUPS),
    "online dpo": (OnlineDPO, {**GROUPS, "minibatch_size": 4}),
    "prioritised": (DQN, {**REPLAY, "prioritised": True}),
    "pathwise": (Pathwise, REPLAY),
}
CASES = [pytest.param(name, marks=[] if name in ("ppo", "grpo") else pytest.mark.slow) for name in AGENTS]

pytestmark = pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")


def make_envs(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": ["a", "b", "c"],
        "tokenizer": byte_tokenizer(),
        "reward": lambda completions: [float(sum(map(ord, text)) % 7) for text in completions],
        "reference": mock_lm(),
        "kl_coef": 0.02,
        "kl_mode": "deferred",
        "max_new_tokens": 3,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=4, **{**settings, **changes})


def make_agent(name: str, envs: Any = None, **changes: Any) -> Any:
    kind, settings = AGENTS[name]
    policy = ActorCritic.from_pretrained(mock_lm())
    config = kind.config_class(**{"episodes_per_update": 8, **settings, **changes})
    return kind(policy, make_envs() if envs is None else envs, config)


class Diary:
    """Metrics of all updates, and how many episodes each had."""

    def __init__(self, agent: Any) -> None:
        self.metrics: list[dict[str, float]] = []
        self.sizes: list[int] = []
        update = agent.update

        def seen(rollout: Rollout, kl: Any) -> Any:
            self.sizes.append(len(rollout))
            return update(rollout, kl)

        agent.update = seen

    def __call__(self, agent: Any, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


@pytest.mark.parametrize("name", CASES)
def test_the_last_update_has_the_episodes_that_are_left(name: str) -> None:
    """Groups of a prompt stay whole."""
    agent = make_agent(name)
    diary = Diary(agent)
    agent.learn(9, diary)
    last = AGENTS[name][1].get("group_size", 1)
    assert diary.sizes == [8, last]
    assert agent.episodes == diary.metrics[-1]["episodes"] == 8 + last
    assert all(math.isfinite(value) for metrics in diary.metrics for value in metrics.values())


def test_a_run_made_longer_plays_the_difference_and_goes_on_learning(tmp_path: Path) -> None:
    agent = make_agent("ppo", learning_rate=1e-3, warmup=0.5)
    diary = Diary(agent)
    agent.learn(5, diary).learn(5, diary).save(tmp_path / "agent")
    longer = PPO.load(tmp_path / "agent", make_envs())
    more = Diary(longer)
    longer.learn(7, more).learn(20, more)
    assert (diary.sizes, more.sizes) == ([5], [2, 8, 5])
    assert all(0 < metrics["lr"] <= 1e-3 for metrics in diary.metrics + more.metrics)


def test_schedules_count_episodes() -> None:
    """A whole update has the learning rate that it has in any run; the coefficient of the KL moves by episodes."""
    agent = make_agent("ppo", make_envs(kl_coef=AdaptiveKL(1e-6, coef=0.1)), learning_rate=1e-3)
    diary = Diary(agent)
    numbers: list[int] = []
    controller = agent.penalty.controller
    agent.penalty.controller.update = lambda kl, n: (numbers.append(n), type(controller).update(controller, kl, n))
    agent.learn(20, diary)
    assert numbers == [8, 8, 4]
    assert [metrics["lr"] for metrics in diary.metrics] == pytest.approx([1e-3, 1e-3 * 12 / 20, 1e-3 * 4 / 20])


def test_rewards_are_told_how_many_updates_there_are() -> None:
    steps: list[tuple[int, int]] = []

    def reward(completions: list[str], trainer_state: Any) -> list[float]:
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completions)

    agent = make_agent("ppo", make_envs(reward=reward), episodes_per_update=4)
    agent.learn(6).learn(11)
    assert steps == [(0, 2), (1, 2), (2, 4), (3, 4)]


def test_processes_have_a_whole_group_each(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("grpo", episodes_per_update=16)
    assert [agent.size_of_update(left) for left in (1, 4, 5, 16, 17)] == [4, 4, 8, 16, 16]
    monkeypatch.setattr(rollout_agent, "count", lambda: 3)
    assert [agent.size_of_update(left) for left in (1, 4, 13, 16, 17)] == [12, 12, 16, 16, 16]
