"""check_reward: what it finds, and what it leaves in peace."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from textgym.rewards import functions
from textgym.rewards.models import RewardModel
from textgym.testing import check_reward


def shares(completions: list[str]) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


def by_token(completion_ids: list[list[int]]) -> list[list[float]]:
    return [[1.0] * len(ids) for ids in completion_ids]


async def remote(completions: list[str]) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if not text else 1.0 for text in completions]


@pytest.mark.parametrize("reward", [shares, by_token, remote, "textgym.rewards.functions:exact_match"])
def test_good_functions_have_nothing_to_fear(reward: Any) -> None:
    assert check_reward(reward, {"answer": "4"}) == []


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (functions.NumericAnswer(), {"answer": 4}),
        (functions.contains_all, {"concepts": ["film", "joy"]}),
        (functions.json_valid, {}),
        (functions.RegexMatch("a.c"), {}),
        (functions.LengthTarget(5), {}),
        (functions.SoftOverlong(20, 10), {}),
        (functions.DistinctN(), {}),
        (functions.RepetitionPenalty(), {}),
        (functions.completion_length, {}),
        (functions.lexicon_sentiment, {}),
        (functions.JsonSchema({"type": "object"}), {}),
        (functions.GrammarMatch('start: "a" | "b"'), {}),
        (functions.Bleu(), {"references": ["a cat", "a dog"]}),
        (functions.Chrf(), {"references": "a cat"}),
        (functions.Rouge("rougeLsum"), {"references": "a cat"}),
        (functions.Meteor(), {"references": "a cat"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_our_own_functions_have_nothing_to_fear(function: Any, columns: dict[str, Any]) -> None:
    assert check_reward(function, columns) == []


def test_a_reward_model_has_nothing_to_fear() -> None:
    model = RewardModel.from_pretrained("tiny")
    model.max_length = 64  # the long text is then no work
    assert check_reward(model) == []


# --- what it finds ---


def divides(completions: list[str]) -> list[float]:
    return [1 / len(text) for text in completions]


def drops_rows(completions: list[str]) -> list[float]:
    return [1.0 for text in completions if text.strip()]


def only_latin(completions: list[str]) -> list[float]:
    return [float(len(text.encode("ascii"))) for text in completions]


def spoils(completion_ids: list[list[int]]) -> list[float]:
    completion_ids[0].clear()
    return [0.0] * len(completion_ids)


def ranks(completions: list[str]) -> list[float]:
    return [float(sum(len(other) < len(text) for other in completions)) for text in completions]


def by_place(completions: list[str]) -> list[float]:
    return [float(index) for index in range(len(completions))]


def wavers(completions: list[str]) -> list[float]:
    return [random.random() for _ in completions]


async def sleeps(completions: list[str]) -> list[float]:
    await asyncio.sleep(60)
    return [0.0] * len(completions)


def wants_more(completions: list[str], grade: list[float]) -> list[float]:
    return grade


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (divides, "empty completion: reward function 'divides' raised ZeroDivisionError"),
        (drops_rows, "white space: reward function 'drops_rows' must return a list of 2 values"),
        (only_latin, "many scripts: reward function 'only_latin' raised UnicodeEncodeError"),
        (spoils, "it changes its arguments"),
        (ranks, "it gives a row another score alone than in a batch"),
        (by_place, "it gives a row another score when the batch is in another order"),
        (wavers, "it gives other scores when it is called again"),
        (sleeps, "did not answer within 0.05 s"),
        (wants_more, "missing a required argument: 'grade'"),
        (lambda completions: [0.0] * len(completions), "it does not pickle"),
    ],
)
def test_what_it_finds(function: Any, problem: str) -> None:
    found = check_reward(function, timeout=0.05 if function is sleeps else 60.0)
    assert any(problem in line for line in found), found
