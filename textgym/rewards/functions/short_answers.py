"""Rewards for short answers to questions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from textgym.data.messages import Text, plain
from textgym.rewards.functions.references import References, listed

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_f1(completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
    """Return the F1 of shared words, from 0 to 1: the maximum over the answers in the column `references`.

    The values are those of SQuAD 2.0's evaluation (Rajpurkar et al., 2018): case and articles are ignored, ASCII
    punctuation is removed, so that "U.S." is "us" and "1,000" is "1000", and words are what white space separates. A
    question without an answer has the empty text as its answer, which a completion without words alone gives.

    >>> token_f1(["The Soviet Union.", "Sputnik", ""], references=["soviet union", ["Sputnik 1", "Sputnik"], "yes"])
    [1.0, 1.0, 0.0]
    """
    return [
        _best_f1(_words(text), answers) if answers else None
        for text, answers in zip(plain(completions), listed(references), strict=True)
    ]


def _best_f1(words: list[str], answers: list[str]) -> float:
    wanted = [_words(answer) for answer in answers]
    return max(_f1(words, answer) for answer in [answer for answer in wanted if answer] or [[]])


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))
