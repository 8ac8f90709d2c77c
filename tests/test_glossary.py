"""docs/metrics.md: it explains each metric that agents log, and no metric that none logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from transformers import TrainerCallback

from textgym import ActorCritic, agents
from textgym.agents.runs.heldout import HeldOut
from textgym.rewards.models import RewardModelConfig, train_reward_model
from textgym.testing import byte_tokenizer, mock_lm

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE))
UNTRIED = {"loss/ptx_avg"}
"""Metrics that only further data bring about."""

PROMPTS = ["ab", "c", "de", "f"]


def length(completions: list[str]) -> list[float]:
    return [float(len(text.encode()) % 3) for text in completions]


def make_envs(**changes: Any) -> Any:
    arguments = {"prompts": PROMPTS, "tokenizer": byte_tokenizer(), "reward": length, "max_new_tokens": 2}
    return gym.make_vec("textgym/Text-v0", num_envs=4, **{**arguments, "kl_coef": 0.1, **changes})


def of_rollouts(name: str, environment: dict[str, Any], **settings: Any) -> set[str]:
    """Names that an agent logs that learns from episodes, with an evaluation on held-out prompts."""
    config = getattr(agents, f"{name}Config")(episodes_per_update=4, **settings)
    critic = "separate" if "critic_learning_rate" in settings else "shared"
    policy = ActorCritic.from_pretrained(mock_lm(), critic)
    agent = getattr(agents, name)(policy, make_envs(**environment), config)
    names: set[str] = set()
    held_out = HeldOut(make_envs(**environment), agent.penalty.reference, every=1, samples=4)
    agent.learn(8, [held_out, lambda agent, metrics: names.update(metrics)])
    return names


def of_data(name: str, rows: list[dict[str, str]], **settings: Any) -> set[str]:
    """Names that SFT or DPO logs."""
    names: set[str] = set()
    config = getattr(agents, f"{name}Config")(**settings)
    agent = getattr(agents, name)(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), config)
    agent.learn(lambda agent, metrics: names.update(metrics))
    return names


class _Log(TrainerCallback):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.names |= set(logs) if "loss" in logs else set()  # at the end there is a summary of the times


def of_reward_model(folder: Path) -> set[str]:
    """Names that the training of a reward model logs."""
    mock_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    pairs = [{"prompt": f"question {number}", "chosen": " yes", "rejected": " no"} for number in range(11)]
    log = _Log()
    train_reward_model(
        pairs[:10], str(folder), config=RewardModelConfig(batch_size=1), heldout=pairs[10:], callbacks=[log]
    )
    return log.names


SFT_ROWS = [{"prompt": "a", "completion": "b"}]
DPO_ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
MAIN: dict[str, Any] = {
    "PPO": lambda: of_rollouts("PPO", {}, minibatch_size=4),
    "GRPO": lambda: of_rollouts("GRPO", {}, group_size=2),
    "DQN": lambda: of_rollouts("DQN", {}, batch_size=4, learning_starts=4, gradient_steps=1),
    "SFT": lambda: of_data("SFT", SFT_ROWS),
    "DPO": lambda: of_data("DPO", DPO_ROWS),
}
FURTHER: dict[str, Any] = {
    "PPO, penalty": lambda: of_rollouts(
        "PPO",
        {"score_scaling": "running", "on_reward_error": "skip"},
        variant="penalty",
        kl_in="loss",
        importance_cap=2.0,
        on_nonfinite="skip",
        constraints={"length": 1.0},
    ),
    "NLPO": lambda: of_rollouts("NLPO", {}),
    "A2C": lambda: of_rollouts("A2C", {"prompts": PROMPTS[:2]}),
    "REINFORCE": lambda: of_rollouts("REINFORCE", {}, baseline="learned", critic_learning_rate=1e-4),
    "GRPO, KL in the loss": lambda: of_rollouts("GRPO", {}, group_size=2, kl_in="loss", dynamic_sampling=1),
    "RLOO": lambda: of_rollouts("RLOO", {}, group_size=2),
    "OnlineDPO": lambda: of_rollouts("OnlineDPO", {}, group_size=2),
    "ExpertIteration": lambda: of_rollouts("ExpertIteration", {}, group_size=2),
    "Pathwise": lambda: of_rollouts("Pathwise", {}, batch_size=4, learning_starts=4, gradient_steps=1),
}


def general(names: set[str]) -> set[str]:
    """Names with <name> for that of the reward function."""
    return {re.sub(r"/length/", "/<name>/", name) for name in names}


def test_each_row_of_the_page_is_whole() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(NAMES) > 50
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


@pytest.mark.parametrize("agent", MAIN)
def test_what_an_agent_logs_is_on_the_page(agent: str) -> None:
    assert general(MAIN[agent]()) <= NAMES


@pytest.mark.slow
def test_what_a_reward_model_logs_is_on_the_page(tmp_path: Path) -> None:
    logged = of_reward_model(tmp_path)
    assert "loss" in logged
    assert logged <= NAMES


@pytest.mark.slow
def test_what_is_on_the_page_is_logged_by_some_agent() -> None:
    logged = {name for run in (*MAIN.values(), *FURTHER.values()) for name in general(run())}
    assert logged == NAMES - UNTRIED
