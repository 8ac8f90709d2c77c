"""play: every episode counts once, whoever plays, and figures are those of the environment by itself."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import textgym  # noqa: F401  (registers the ids)
from textgym.testing import Played, mean_and_error, play

ID = "textgym/SentimentMLP-v0"


def test_episodes_are_those_of_the_environment_by_itself() -> None:
    seen: list[Any] = []

    def act(observations: np.ndarray) -> list[int]:
        seen.append(observations.copy())
        return [0, 31, 7]

    played = play(ID, act, 3, max_new_tokens=6)
    for row, action in enumerate([0, 31, 7]):
        env = gym.make(ID, max_new_tokens=6)
        observation, _ = env.reset(options={"prompt_index": row})
        total, done, steps = 0.0, False, 0
        while not done:
            np.testing.assert_allclose(seen[steps][row], observation, atol=1e-4)
            observation, reward, done, _, info = env.step(action)
            total, steps = total + float(reward), steps + 1
        assert played.scores[row] == pytest.approx(info["score"], abs=1e-4)
        assert played.returns[row] == pytest.approx(total, abs=1e-4)


def test_more_episodes_than_prompts_begin_with_them_again() -> None:
    played = play(ID, lambda observations: np.zeros(len(observations), int), 5, prompts=["The", "A film"])
    np.testing.assert_allclose(played.scores, played.scores[[0, 1, 0, 1, 0]], atol=1e-4)


def test_mean_and_standard_error() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert mean_and_error(values) == "+2.50 ± 0.65"  # a deviation of sqrt(5 / 3), over sqrt(4)
    assert str(Played(values, values - 9)) == "+2.50 ± 0.65"
    assert mean_and_error(np.array([1.0, 2.0, np.nan, 3.0, 4.0])) == "+2.50 ± 0.65", (
        "without a score is not a score of 0"
    )


def test_repeated_prompts_do_not_make_an_error_smaller() -> None:
    """The values of four prompts, sixteen times each, are those of four prompts."""
    values, prompts = np.array([1.0, 2.0, 3.0, 4.0]), np.arange(4)
    assert mean_and_error(values, prompts) == "+2.50 ± 0.65"
    assert mean_and_error(np.tile(values, 16), np.tile(prompts, 16)) == "+2.50 ± 0.65"
    assert mean_and_error(np.tile(values, 16)) == "+2.50 ± 0.14"
    assert mean_and_error(values, np.zeros(4)) == "+2.50 ± 0.65", "of the only prompt"
    played = play(ID, lambda observations: np.arange(len(observations)) % 3, 6, prompts=["The", "A film"])
    assert played.prompts is not None
    assert played.prompts.tolist() == [0, 1, 0, 1, 0, 1]


def test_episodes_without_a_score_have_none() -> None:
    def unsure(completions: list[str]) -> list[float | None]:
        return [None if row % 2 else 1.0 for row in range(len(completions))]

    played = play(ID, lambda observations: np.zeros(len(observations), int), 4, reward=unsure, max_new_tokens=2)
    assert np.isnan(played.scores).tolist() == [False, True, False, True]
    assert str(played) == "+1.00 ± 0.00"
