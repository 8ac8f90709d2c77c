"""Rewards that need nothing but the text: matching, answers, JSON, length, repetition.

Those with settings are dataclasses, so all of them can be pickled. Of conversations they read the plain text. If a text
is compared with something, that is a column of the prompts, which the docstring names.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from textgym.data.messages import Text, plain
from textgym.errors import ConfigError
from textgym.rewards.functions.numbers import last_fraction
from textgym.settings import Count, NotNegative, check_settings


def exact_match(completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Return 1 if the completion equals the column `answer`, ignoring surrounding white space, else 0.

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
    """Return the share of the words in the column `concepts` that occur in the completion, ignoring case.

    >>> contains_all(["The dog ran.", "Dogs"], concepts=[["dog", "run"], ["dog"]])
    [0.5, 0.0]
    """
    return [
        None if words is None else _share_contained(text, [words] if isinstance(words, str) else words)
        for text, words in zip(plain(completions), concepts, strict=True)
    ]


def json_valid(completions: Sequence[Text], **_: Any) -> list[float]:
    """Return 1 if the whole completion is a JSON value, else 0.

    >>> json_valid([' {"a": [1, 2]}', "{a: 1}", "NaN"])
    [1.0, 0.0, 0.0]
    """
    return [float(_is_json(text)) for text in plain(completions)]


@dataclass(frozen=True)
class RegexMatch:
    """Reward of 1 if a regular expression matches part of the completion, or with `full` all of it, else 0.

    >>> RegexMatch(r"<answer>.*</answer>")(["so <answer>4</answer>", "4"])
    [1.0, 0.0]
    """

    pattern: str
    full: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern must be a regular expression, got {self.pattern!r}: {error}") from error

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Score completions."""
        pattern = re.compile(self.pattern, re.DOTALL)
        match = pattern.fullmatch if self.full else pattern.search
        return [float(match(text) is not None) for text in plain(completions)]


@dataclass(frozen=True)
class NumericAnswer:
    """Reward of 1 if the last number in the completion equals the column `answer`, else 0.

    `answer` is a number, or a text whose last number counts. Numbers are read as `last_number` says: a fraction such as
    1/2 is one number, equal to 0.5. Two whole numbers are equal if they are the same, of any size and whatever the
    tolerance.

    Attributes:
        tolerance: Allowed difference between other numbers: relative to an answer with decimals, absolute if the answer
            is whole or near 0.

    >>> NumericAnswer()(["3 + 4 = 7.", "about 1,200", "0.5", "none"], answer=["7", 1200.0, "1/2", 1])
    [1.0, 1.0, 1.0, 0.0]
    >>> NumericAnswer()(["1000001", "3.1415926", "3.9999999"], answer=[1000000, 3.14159265, 4])
    [0.0, 1.0, 1.0]
    """

    tolerance: NotNegative = 1e-6

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, completions: Sequence[Text], answer: Sequence[Any], **_: Any) -> list[float | None]:
        """Score completions."""
        return [
            None if b is None else float(self._equal(last_fraction(a), last_fraction(str(b))))
            for a, b in zip(plain(completions), answer, strict=True)
        ]

    def _equal(self, given: Fraction | None, wanted: Fraction | None) -> bool:
        if given is None or wanted is None:
            return False
        whole = wanted.denominator == 1
        if whole and given.denominator == 1:
            return given == wanted
        allowed = self.tolerance if whole else self.tolerance * max(1.0, abs(float(wanted)))
        return abs(given - wanted) <= allowed


def completion_length(*, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Return the number of sampled tokens, stop token included; use weight 0 to report it as a metric.

    >>> completion_length(completion_ids=[[1, 2, 3], [4]])
    [3.0, 1.0]
    """
    return [float(len(ids)) for ids in completion_ids]


@dataclass(frozen=True)
class LengthTarget:
    """Minus the distance from a target length, in units of that length; the stop token counts.

    >>> LengthTarget(4)(completion_ids=[[1, 2, 3, 4], [1, 2]])
    [0.0, -0.5]
    """

    tokens: Count

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Score completions."""
        return [-abs(len(ids) - self.tokens) / self.tokens for ids in completion_ids]


@dataclass(frozen=True)
class SoftOverlong:
    """Penalty for long texts: 0 up to `max_tokens - buffer` tokens, then linear to -1 at `max_tokens` and above.

    Source: Yu et al., 2025 (DAPO), equation 13.

    >>> SoftOverlong(max_tokens=10, buffer=4)(completion_ids=[[0] * 6, [0] * 8, [0] * 12])
    [0.0, -0.5, -1.0]
    """

    max_tokens: Count
    buffer: Count

    def __post_init__(self) -> None:
        check_settings(self)
        if self.buffer > self.max_tokens:
            raise ConfigError(f"buffer must be from 1 to max_tokens={self.max_tokens}, got {self.buffer}")

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Score completions."""
        return [  # "0.0 -" and not "-", which would return -0.0 for short texts
            0.0 - min(1.0, max(0.0, (len(ids) - self.max_tokens + self.buffer) / self.buffer)) for ids in completion_ids
        ]


@dataclass(frozen=True)
class DistinctN:
    """Share of distinct word n-grams among all of a completion's; 1 for texts without n-grams.

    >>> DistinctN(1)(["a b a b", "a"])
    [0.5, 1.0]
    """

    n: Count = 2

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Score completions."""
        return [_distinct(text, self.n) for text in plain(completions)]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of a completion's word n-grams that repeat an earlier one: 0 without repetition, at least -1.

    >>> RepetitionPenalty(1)(["a b a b", "a b c"])
    [-0.5, 0.0]
    """

    n: Count = 3

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Score completions."""
        return [_distinct(text, self.n) - 1.0 for text in plain(completions)]


def _share_contained(text: str, words: Sequence[str]) -> float:
    if not words:
        return 1.0
    # Look-arounds and not \b, which would fail for concepts that begin or end with punctuation, such as "C++".
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in words]
    return sum(found) / len(words)


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: If it is not JSON. NaN and Infinity are not JSON, although Python's parser accepts them.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:  # a policy may generate thousands of opening brackets
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
