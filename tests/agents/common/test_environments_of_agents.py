"""What an agent does to the environment that it is given, and which ones it takes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from textgym.agents import DQN, PPO, DQNConfig, PPOConfig
from textgym.agents.runs.evaluation import generate
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.engine.completions_to_score import RewardError
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import byte_tokenizer, mock_lm

Make = Any


def vowels(completions: list[str]) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeiou") / 4 for text in completions]


def make_envs(num_envs: int = 4, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": ["ab", "c", "def"],
        "tokenizer": byte_tokenizer(),
        "reward": vowels,
        "max_prompt_tokens": 4,
        "max_new_tokens": 6,
    }
    return gym.make_vec("textgym/Text-v0", num_envs, **settings | changes)


def make_policy() -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm())


CONFIGS = {
    PPO: PPOConfig(episodes_per_update=8, minibatch_size=8, num_epochs=1),
    DQN: DQNConfig(episodes_per_update=8, batch_size=8, gradient_steps=1, learning_starts=8),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_an_agent_leaves_the_environment_as_its_owner_made_it(kind: Any, mode: AutoresetMode, array: str) -> None:
    envs = make_envs(autoreset_mode=mode, array=array, reference=mock_lm(), kl_coef=0.1)
    agent = kind(make_policy(), envs, CONFIGS[kind])
    agent.learn(16, [lambda *_: owners(envs, mode, array)])
    generate(agent.policy, envs, [0, 1], seed=0)
    owners(envs, mode, array)


def owners(envs: Any, mode: AutoresetMode, array: str) -> None:
    """Plays the environment as its owner does, who is told to begin anew."""
    assert envs.unwrapped.metadata["autoreset_mode"] == envs.unwrapped.autoreset_mode == mode
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.zeros(4, dtype=np.int64))
    envs.reset()
    observation, rewards, *_ = envs.step(np.full(4, 7))
    kind = torch.Tensor if array == "torch" else np.ndarray
    assert isinstance(observation["input_ids"], kind)
    assert isinstance(rewards, kind)
    assert (rewards != 0).all(), "the KL term of somebody who steps by hand, whom the agent's rollouts do not pay"


def test_a_failure_in_a_rollout_leaves_the_environment_as_it_was() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise OSError("no answer")

    envs = make_envs(reward=broken)
    with pytest.raises(RewardError, match="no answer"):
        PPO(make_policy(), envs, CONFIGS[PPO]).learn(8)
    assert envs.unwrapped.autoreset_mode == AutoresetMode.NEXT_STEP
    assert envs.unwrapped.array == "numpy"


def test_the_same_run_whoever_was_to_pay_the_kl_and_whatever_the_arrays() -> None:
    runs = []
    for changes in (
        {},
        {"kl_mode": "deferred"},
        {"kl_mode": "deferred", "array": "torch", "autoreset_mode": "Disabled"},
    ):
        envs = make_envs(**changes, reference=mock_lm(), kl_coef=0.1)
        rows: list[dict[str, float]] = []
        PPO(make_policy(), envs, CONFIGS[PPO]).learn(16, [lambda agent, metrics, rows=rows: rows.append(metrics)])
        runs.append([{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows])
    assert runs[0] == runs[1] == runs[2]
    assert all(row["objective/non_score_reward"] != 0 for row in runs[0][1:]), "the KL is paid"


@pytest.mark.parametrize(
    "changes", [{"kl_coef": AdaptiveKL(target=6)}, {"kl_estimator": "full", "kl_coef": 0.1}, {"kl_clamp": 1.0}]
)
def test_a_penalty_that_only_an_agent_can_pay_needs_no_kl_mode_for_it(changes: dict[str, Any]) -> None:
    envs = make_envs(reference=mock_lm(), **changes)
    PPO(make_policy(), envs, CONFIGS[PPO]).learn(8)
    with pytest.raises(ValueError, match="kl_mode='reference'"):
        envs.reset()  # by somebody who would not pay it


def test_the_policys_start_is_the_reference_of_an_environment_without_one() -> None:
    envs = make_envs(kl_coef=0.1)
    agent = PPO(make_policy(), envs, CONFIGS[PPO]).learn(8)
    assert agent.penalty.owns_reference or agent.penalty.reference is not agent.policy
    with pytest.raises(ValueError, match="kl_coef is set but there is no reference"):
        envs.reset()


@pytest.mark.parametrize("mode", ["reference", "exact"])
def test_a_kl_that_the_environment_was_told_to_pay_is_not_paid_twice(mode: str) -> None:
    with pytest.raises(ValueError, match="make the environment without kl_mode, or with kl_mode='deferred'"):
        PPO(make_policy(), make_envs(kl_mode=mode, reference=mock_lm(), kl_coef=0.1), CONFIGS[PPO])
    PPO(make_policy(), make_envs(kl_mode=mode, reference=mock_lm(), kl_coef=0.0), CONFIGS[PPO]).learn(8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("CartPole-v1"),
        lambda: gym.make_vec("CartPole-v1", 2),
        lambda: gym.make("textgym/Sentiment-v0"),
        lambda: SyncVectorEnv([lambda: gym.make("textgym/Sentiment-v0")]),
        lambda: None,
        lambda: make_policy(),
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_no_batch_of_texts_is_refused_in_one_line(kind: Any, make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"agents need a batch of texts, and \w+ is not one: make one with gym.make_vec"
    ):
        kind(make_policy(), make(), CONFIGS[kind])
