"""Shared pieces of the tests of environments and of their views."""

from __future__ import annotations

from typing import Any

import pytest

from textgym.testing import byte_tokenizer, mock_lm


def length_reward(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def settings() -> dict[str, Any]:
    return {
        "prompts": ["hello world", "good day", "a", "four", "fifth prompt"],
        "tokenizer": byte_tokenizer(),
        "reward": length_reward,
        "reference": mock_lm(),
        "kl_coef": 0.1,
        "max_prompt_tokens": 8,
        "max_new_tokens": 5,
    }
