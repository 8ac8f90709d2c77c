"""Shared pieces of the reward tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from textgym.rewards.engine.completions_to_score import Finished
from textgym.testing import byte_tokenizer, mock_lm


@pytest.fixture
def mock_folder(tmp_path: Path) -> Path:
    """A language model to start from, as a folder."""
    folder = tmp_path / "lm"
    mock_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def finished() -> Finished:
    """Two completions of 1 and 3 tokens, with a column."""
    return Finished(
        prompts=["2 + 2 =", "3 + 4 ="],
        completions=[" 4", " 8 or"],
        prompt_ids=[[10, 11], [12, 13]],
        completion_ids=[[20], [21, 22, 23]],
        columns={"answer": ["4", "7"]},
    )
