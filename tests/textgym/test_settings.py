"""Configs: what their annotations refuse, and how the error says it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from textgym.errors import ConfigError, TextgymError
from textgym.settings import Count, NotNegative, Positive, Share, check_settings


@dataclass
class Config:
    learning_rate: NotNegative = 0.1
    gamma: Share = 1.0
    n_steps: Count = 1
    clip: Positive | None = None
    variant: Literal["clip", "penalty"] = "clip"
    whiten: bool = False
    name: str = "run"
    anything: Any = None

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan; the default is 0.1"),
        ({"learning_rate": "fast"}, "learning_rate must be a finite number, got 'fast'"),
        ({"learning_rate": True}, "learning_rate must be a finite number, got True"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0, got -0.1"),
        ({"gamma": 1.5}, "gamma must be from 0 to 1, got 1.5; the default is 1.0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"n_steps": 1.0}, "n_steps must be a whole number, got 1.0"),
        ({"clip": 0.0}, "clip must be above 0 or None, got 0.0"),
        ({"clip": float("inf")}, "clip must be a finite number or None, got inf"),
        ({"variant": "trust"}, "variant must be 'clip' or 'penalty', got 'trust'"),
        ({"whiten": 1}, "whiten must be True or False, got 1"),
        ({"name": 3}, "name must be a string, got 3"),
    ],
)
def test_a_value_that_the_annotation_does_not_allow(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Config(**change)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TextgymError)


def test_values_that_are_allowed() -> None:
    Config(learning_rate=0, gamma=np.float32(0.5), n_steps=np.int64(2), clip=3, anything=object())
