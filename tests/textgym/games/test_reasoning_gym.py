"""Data sets of reasoning-gym itself (extra `tasks`)."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import textgym  # noqa: F401  (registers)
from textgym.games import TurnActions, from_reasoning_gym
from textgym.testing import byte_tokenizer
from textgym.wrappers import TextObservation

reasoning_gym = pytest.importorskip("reasoning_gym")

SETTINGS: dict[str, Any] = {"tokenizer": byte_tokenizer(), "max_prompt_tokens": 6000, "max_new_tokens": 3000}


def score(dataset: Any, index: int, answer: str) -> float:
    env = TurnActions(TextObservation(from_reasoning_gym(dataset, **SETTINGS)))
    env.reset(options={"prompt_index": index})
    _, reward, terminated, *_ = env.step(answer)
    assert terminated
    return reward


@pytest.mark.parametrize("task", ["chain_sum", "prime_factorization", "game_of_life", "leg_counting"])
def test_the_right_answer_scores_one(task: str) -> None:
    dataset = reasoning_gym.create_dataset(task, size=2, seed=1)
    assert score(dataset, 1, dataset[1]["answer"]) == 1.0


@pytest.mark.parametrize(
    ("task", "answer"),
    [("prime_factorization", "x"), ("boxnet", "[1,2]"), ("coin_flip", "1e999"), ("game_of_life", "{}")],
)
def test_an_answer_that_the_scorer_cannot_read_scores_nothing(task: str, answer: str) -> None:
    dataset = reasoning_gym.create_dataset(task, size=1, seed=1)
    with pytest.raises((ValueError, AttributeError, OverflowError, KeyError)):
        dataset.score_answer(answer, dataset[0])
    assert score(dataset, 0, answer) == 0.0


def test_the_data_sets_own_settings_score() -> None:
    settings = {"max_date_difference_days": 1000, "task_types": ["date"]}  # by which a near answer is near
    wide = reasoning_gym.create_dataset("time_intervals", size=1, seed=1, **settings)
    assert reasoning_gym.get_score_answer_fn("time_intervals")("5 days", wide[0]) == pytest.approx(0.41)
    assert wide.score_answer("5 days", wide[0]) == pytest.approx(0.941)
    assert score(wide, 0, "5 days") == pytest.approx(0.941)
    env = gym.make("textgym/ReasoningGym-v0", task="time_intervals", config=settings, size=1, seed=1, kl_coef=0.0)
    env = TurnActions(TextObservation(env))
    env.reset()
    assert env.step("5 days")[1] == pytest.approx(0.941)


@pytest.mark.parametrize("task", ["list_functions", "pool_matrix"])
def test_making_questions_leaves_global_generators_alone(task: str) -> None:
    before = random.getstate(), repr(np.random.get_state())
    from_reasoning_gym(reasoning_gym.create_dataset(task, size=3, seed=1), **SETTINGS)
    assert (random.getstate(), repr(np.random.get_state())) == before
