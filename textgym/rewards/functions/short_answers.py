"""Rewards for short answers to questions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from textgym.data.messages import Text, plain
from textgym.rewards.functions.overlap import References

ARTICLES = {"a", "an", "the"}


def token_f1(completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
    """Return the F1 of shared words, from 0 to 1: the maximum over the answers in the column `references`.

    Case, punctuation and articles are ignored. Source: Rajpurkar et al., 2016 (SQuAD).

    >>> token_f1(["The Soviet Union.", "Sputnik", ""], references=["soviet union", ["Sputnik 1", "Sputnik"], "yes"])
    [1.0, 1.0, 0.0]
    """
    return [
        max(_f1(_words(text), _words(wanted)) for wanted in ([row] if isinstance(row, str) else row)) if row else None
        for text, row in zip(plain(completions), references, strict=True)
    ]


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ARTICLES]


def _f1(words: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0
