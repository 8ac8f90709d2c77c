"""check_text_env passes what is right and says what is wrong."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.testing import byte_tokenizer, check_text_env, mock_lm


def length_reward(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


SETTINGS: dict[str, Any] = {
    "prompts": ["hello world", "good day", "a"],
    "tokenizer": byte_tokenizer(),
    "reward": [length_reward, length_reward],
    "reward_weights": [1.0, 0.5],
    "reference": mock_lm(),
    "kl_coef": 0.1,
    "max_prompt_tokens": 8,
    "max_new_tokens": 6,
}


@pytest.mark.parametrize(
    "further",
    [
        {},
        {"min_new_tokens": 3, "length_limit": "truncate", "missing_eos_penalty": 2.0},
        {"score_scaling": "running", "score_clip": 1.0, "info_text": True},
    ],
)
def test_good_ones_pass(further: dict[str, Any]) -> None:
    settings = {**SETTINGS, **further}
    check_text_env(TextEnv(**settings), None if "score_scaling" in further else TextVectorEnv(2, **settings))
    check_text_env(gym.make("textgym/Text-v0", **{**SETTINGS, "max_new_tokens": 2}))


class NumpyFlags(TextEnv):
    def step(self, action: int) -> Any:
        observation, reward, terminated, *rest = super().step(action)
        return observation, reward, np.bool_(terminated), *rest


class HiddenBonus(TextEnv):
    def step(self, action: int) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, reward + 0.5, *rest


class OneArray(TextEnv):
    def _observation(self) -> Any:
        self.shown = getattr(self, "shown", None) or super()._observation()
        for key, value in super()._observation().items():
            self.shown[key][:] = value
        return dict(self.shown)


class TwoTokens(TextEnv):
    def step(self, action: int) -> Any:
        observation, *rest = super().step(action)
        observation["input_ids"][-1] = 5
        return observation, *rest


class BothFlags(TextEnv):
    def step(self, action: int) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated or terminated, info


class LengthAsTruncation(TextEnv):
    def step(self, action: int) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        by_length = terminated and not info["ended_by_stop"]
        return observation, reward, terminated and not by_length, by_length, info


class GlobalGenerator(TextEnv):
    def step(self, action: int) -> Any:
        random.random()
        return super().step(action)


class OneInfo(TextEnv):
    info: dict[str, Any] = {}  # noqa: RUF012

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        self.info.update(info)
        return self.info


class UnloggedScore(TextEnv):
    def step(self, action: int) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward + terminated, terminated, truncated, {**info, "score": info.get("score", 0.0) + 1}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NumpyFlags, r"bool"),
        (HiddenBonus, "info must include all rewards"),
        (OneArray, "must return new observation data"),
        (TwoTokens, r"it differs at the positions \[13\]"),
        (BothFlags, "set exactly one"),
        (LengthAsTruncation, "unless length_limit='truncate'"),
        (GlobalGenerator, "self.np_random only"),
        (OneInfo, "must return new info data"),
        (UnloggedScore, "the components add up to"),
    ],
)
def test_broken_ones_are_told_what_to_do(broken: type[TextEnv], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_text_env(broken(**SETTINGS))


def test_a_row_that_differs() -> None:
    with pytest.raises(AssertionError, match=r"row \d of the vector environment returned reward"):
        check_text_env(TextEnv(**SETTINGS), TextVectorEnv(2, **{**SETTINGS, "kl_coef": 0.2}))
    prompts = ["hello world", "good dog", "b"]
    with pytest.raises(AssertionError, match=r"row \d of the vector environment has other input_ids"):
        check_text_env(TextEnv(**SETTINGS), TextVectorEnv(8, **{**SETTINGS, "prompts": prompts}))


def test_what_the_libraries_say_is_passed_on() -> None:
    env = TextEnv(**SETTINGS)
    env.observation_space = gym.spaces.Dict({"input_ids": env.observation_space["input_ids"]})
    with pytest.raises(AssertionError, match="Gymnasium's check_env reports"):
        check_text_env(env)


def test_a_limit_of_steps_is_found() -> None:
    with pytest.raises(AssertionError, match="max_episode_steps ends episodes before they are scored"):
        check_text_env(gym.make("textgym/Text-v0", max_episode_steps=2, **SETTINGS))
