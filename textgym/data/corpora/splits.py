"""Splits decided by a hash of the text, so that they are the same everywhere and a duplicate stands on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from textgym.data.rows import Row

SPLITS = ("train", "validation", "test")


def split_of(text: str) -> str:
    """`"train"` (80%), `"validation"` (10%) or `"test"` (10%), whatever the case of the text.

    >>> split_of("A film."), split_of("a film.")
    ('test', 'test')
    """
    bucket = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def in_split(rows: Iterable[Row], split: str, key: str = "prompt") -> list[Row]:
    """The rows of a split, which the text in the column `key` decides.

    Raises:
        ValueError: an unknown split.
    """
    check_split(split)
    return [row for row in rows if split_of(row[key]) == split]


def check_split(split: str) -> None:
    """Raises a ValueError where there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: use 'train', 'validation' or 'test'")
