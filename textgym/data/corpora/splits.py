"""Splits by a hash of the text: the same on every machine, and duplicates are always in the same split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from textgym.data.rows import Row

SPLITS = ("train", "validation", "test")


def split_of(text: str) -> str:
    """Return the split of a text: `"train"` (80%), `"validation"` (10%) or `"test"` (10%); case does not matter.

    >>> split_of("A film."), split_of("a film.")
    ('test', 'test')
    """
    bucket = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def in_split(rows: Iterable[Row], split: str, key: str = "prompt") -> list[Row]:
    """Return the rows whose text in the column `key` is in a split.

    Raises:
        ValueError: If the split is unknown.
    """
    check_split(split)
    return [row for row in rows if split_of(row[key]) == split]


def check_split(split: str) -> None:
    """Raise a ValueError if the split is unknown."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: use 'train', 'validation' or 'test'")
