"""Ready-made rewards that need nothing but the text: matching, answers, JSON, length, repetition.

Functions, and dataclasses where there are settings, so that all of them pickle. Conversations are read as their plain
text. What a text is compared with is a column of the prompts, named in each docstring.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textgym.data.messages import Text, plain

NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def exact_match(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 where the completion is the column `answer`, but for white space around it.

    >>> exact_match([" yes", "no."], answer=["yes", "no"])
    [1.0, 0.0]
    """
    return [
        None if wanted is None else float(text.strip() == str(wanted).strip())
        for text, wanted in zip(plain(completions), answer, strict=True)
    ]


def contains_all(
    completions: Sequence[Text], concepts: Sequence[str | Sequence[str] | None], **_: Any
) -> list[float | None]:
    """The share of the words in the column `concepts` that the completion has, whatever their case.

    >>> contains_all(["The dog ran.", "Dogs"], concepts=[["dog", "run"], ["dog"]])
    [0.5, 0.0]
    """
    return [
        None if words is None else _share_contained(text, [words] if isinstance(words, str) else words)
        for text, words in zip(plain(completions), concepts, strict=True)
    ]


def json_valid(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the completion is a JSON value and nothing else.

    >>> json_valid([' {"a": [1, 2]}', "{a: 1}", "NaN"])
    [1.0, 0.0, 0.0]
    """
    return [float(_is_json(text)) for text in plain(completions)]


@dataclass(frozen=True)
class RegexMatch:
    """1 where the pattern is found in the completion, or with `full` is all of it.

    >>> RegexMatch(r"<answer>.*</answer>")(["so <answer>4</answer>", "4"])
    [1.0, 0.0]
    """

    pattern: str
    full: bool = False

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Scores completions."""
        found = re.compile(self.pattern, re.DOTALL)
        match = found.fullmatch if self.full else found.search
        return [float(match(text) is not None) for text in plain(completions)]


@dataclass(frozen=True)
class NumericAnswer:
    """1 where the last number in the completion is the column `answer`, a number or its text, within a tolerance.

    Thousands separators are read as such; `tolerance` is relative, and absolute around 0.

    >>> NumericAnswer()(["3 + 4 = 7.", "about 1,200", "none"], answer=["7", 1200.0, 1])
    [1.0, 1.0, 0.0]
    """

    tolerance: float = 1e-6

    def __call__(self, completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
        """Scores completions."""
        return [
            None if b is None else float(self._equal(last_number(a), last_number(str(b))))
            for a, b in zip(plain(completions), answer, strict=True)
        ]

    def _equal(self, given: float | None, wanted: float | None) -> bool:
        if given is None or wanted is None:
            return False
        return math.isclose(given, wanted, rel_tol=self.tolerance, abs_tol=self.tolerance)


def completion_length(*, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Number of tokens sampled, the stop token included. With weight 0 it is a metric and no reward.

    >>> completion_length(completion_ids=[[1, 2, 3], [4]])
    [3.0, 1.0]
    """
    return [float(len(ids)) for ids in completion_ids]


@dataclass(frozen=True)
class LengthTarget:
    """0 at `tokens` tokens, falling by 1 for every `tokens` more or fewer; the stop token counts.

    >>> LengthTarget(4)(completion_ids=[[1, 2, 3, 4], [1, 2]])
    [0.0, -0.5]
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Scores completions."""
        return [-abs(len(ids) - self.tokens) / self.tokens for ids in completion_ids]


@dataclass(frozen=True)
class SoftOverlong:
    """0 up to `max_tokens - buffer` tokens, then falling in a line to -1 at `max_tokens` and beyond.

    Source: Yu et al., 2025 (DAPO), equation 13.

    >>> SoftOverlong(max_tokens=10, buffer=4)(completion_ids=[[0] * 6, [0] * 8, [0] * 12])
    [0.0, -0.5, -1.0]
    """

    max_tokens: int
    buffer: int

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.max_tokens:
            raise ValueError(f"buffer must be from 1 to max_tokens={self.max_tokens}, got {self.buffer}")

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Scores completions."""
        return [
            0.0 - min(1.0, max(0.0, (len(ids) - self.max_tokens + self.buffer) / self.buffer)) for ids in completion_ids
        ]


@dataclass(frozen=True)
class DistinctN:
    """The share of a completion's n-grams of words that are different ones; 1 for texts too short to have any.

    >>> DistinctN(1)(["a b a b", "a"])
    [0.5, 1.0]
    """

    n: int = 2

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Scores completions."""
        return [_distinct(text, self.n) for text in plain(completions)]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of a completion's n-grams of words that repeat an earlier one: 0 for none, near -1 for a loop.

    >>> RepetitionPenalty(1)(["a b a b", "a b c"])
    [-0.5, 0.0]
    """

    n: int = 3

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Scores completions."""
        return [_distinct(text, self.n) - 1.0 for text in plain(completions)]


def last_number(text: str) -> float | None:
    """The last number in a text, `None` where there is none.

    >>> last_number("from 1,000 to 2.5e3"), last_number("no")
    (2500.0, None)
    """
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _share_contained(text: str, words: Sequence[str]) -> float:
    if not words:
        return 1.0
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in words]
    return sum(found) / len(words)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none. NaN and Infinity are Python's, not JSON's.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("the text is nested too deeply") from error


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _distinct(text: str, n: int) -> float:
    words = text.lower().split()
    grams = list(zip(*(itertools.islice(words, start, None) for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
