"""Splits by a hash of the text: the same on every machine, and rows that belong together are in the same split."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

from textgym.data.overlap import clusters, key_of_text
from textgym.data.rows import Row

SPLITS = ("train", "validation", "test")


def split_of(text: str) -> str:
    """Return the split of a text: `"train"` (80%), `"validation"` (10%) or `"test"` (10%); case does not matter.

    >>> split_of("A film."), split_of("a film.")
    ('test', 'test')
    """
    bucket = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def splits_of(texts: Sequence[str], keys: Sequence[Iterable[Hashable]]) -> list[str]:
    """Return the split of each row: rows that share a key have the split of their first text in alphabetical order.

    Args:
        texts: What the split of a row depends on.
        keys: What connects a row with others.

    >>> splits_of(["A film.", "a play"], [["x"], ["x"]])
    ['test', 'test']
    """
    splits = [""] * len(texts)
    for cluster in clusters(keys):
        split = split_of(min(texts[row].lower() for row in cluster))
        for row in cluster:
            splits[row] = split
    return splits


def in_split(rows: Iterable[Row], split: str, key: str = "prompt") -> list[Row]:
    """Return the rows whose text in the column `key` is in a split; punctuation and case do not matter.

    Raises:
        ValueError: If the split is unknown.
    """
    check_split(split)
    rows = list(rows)
    texts = [row[key] for row in rows]
    splits = splits_of(texts, [[key_of_text(text)] for text in texts])
    return [row for row, its_split in zip(rows, splits, strict=True) if its_split == split]


def check_split(split: str) -> None:
    """Raise a ValueError if the split is unknown."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: use 'train', 'validation' or 'test'")
