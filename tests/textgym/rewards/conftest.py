"""Shared pieces of the reward tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from textgym.testing import byte_tokenizer, mock_lm


@pytest.fixture
def mock_folder(tmp_path: Path) -> Path:
    """A language model to start from, as a folder."""
    folder = tmp_path / "lm"
    mock_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
