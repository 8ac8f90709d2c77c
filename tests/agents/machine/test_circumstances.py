"""What a checkpoint remembers of its inputs: prompts, and reward functions with all they were made with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from textgym.agents.machine.circumstances import inputs
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.isolated import Isolated


def closure(weight: float) -> Callable[[list[str]], list[float]]:
    def judge(completions: list[str]) -> list[float]:
        return [weight * len(text) for text in completions]

    return judge


def default(weight: float) -> Callable[[list[str]], list[float]]:
    def judge(completions: list[str], scale: float = weight) -> list[float]:
        return [scale * len(text) for text in completions]

    return judge


def weighted(completions: list[str], scale: float) -> list[float]:
    return [scale * len(text) for text in completions]


class Judge:
    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.itself = {"loop": self}

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.weight * len(text) for text in completions]


class Model:
    """A learned reward, one of whose weights is on no device yet."""

    def __init__(self, weight: float) -> None:
        self.model = torch.nn.Module()
        self.model.weight = torch.nn.Parameter(torch.full((2,), weight))
        self.model.later = torch.nn.Parameter(torch.empty(2, device="meta"))

    def __call__(self, completions: list[str]) -> list[float]:
        return [float(self.model.weight.sum()) for _ in completions]


class Table:
    """A reward by pairs, which are no keys of JSON."""

    def __init__(self, weight: float) -> None:
        self.weight, self.pairs = weight, {("a", "b"): 1.0}

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.weight for _ in completions]


@pytest.mark.parametrize(
    "make",
    [
        closure,
        default,
        Judge,
        Model,
        Table,
        lambda weight: functools.partial(weighted, scale=weight),
        lambda weight: Isolated(closure(weight)),
        lambda weight: functools.wraps(weighted)(closure(weight)),
    ],
    ids=["closure", "default", "object", "weights", "keys of pairs", "partial", "isolated", "decorated"],
)
def test_a_reward_that_was_made_with_something_else_is_another_one(make: Any) -> None:
    def hashes(weight: float) -> dict[str, str]:
        return inputs([{"prompt": "a"}], Scorer(make(weight)), None)

    assert hashes(1.0) == hashes(1.0)
    changed = {name for name, value in hashes(1.0).items() if hashes(2.0)[name] != value}
    assert len(changed) == 1


def test_prompts_are_remembered_with_their_columns() -> None:
    scorer = Scorer(closure(1.0))
    assert inputs([{"prompt": "a", "answer": 1}], scorer, None) != inputs([{"prompt": "a", "answer": 2}], scorer, None)
