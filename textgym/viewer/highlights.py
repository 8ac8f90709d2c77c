"""Highlights: the recorded rows of a run that are worth a look first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from textgym.viewer.rows import RecordedRow

SHOWN = 5
"""Rows of each kind."""
LOWEST = "Lowest scores"
LONGEST_TEXT = 100
"""Characters of a response that a link shows."""
NEVER_BELOW = float("-inf")

Values = Sequence[float | None]
Found = list[Any]
"""A row that stands out: the number, update, row, and the beginning of its text."""


def highest_with_low_judge(rows: Sequence[RecordedRow]) -> Values:
    """Return how much better than its judge each row's score is, both in standard deviations over the rows.

    Only rows whose score is above the mean, and whose judge is below it, have a number. Of several judges the lowest
    one counts.
    """
    scores = standardized([row.outcomes["score"] for row in rows])
    judges = [standardized([row.outcomes[name] for row in rows]) for name in (rows[0].judges if rows else ())]
    gaps = []
    for row, score in enumerate(scores):
        low = min((column[row] for column in judges if column[row] is not None), default=None)  # type: ignore[type-var]
        gaps.append(score - low if score is not None and low is not None and low < 0 < score else None)
    return gaps


def disagreements(rows: Sequence[RecordedRow]) -> Values:
    """Return how far apart the rewards of each row are, in standard deviations of each function over the rows."""
    names = [name for name in (rows[0].outcomes if rows else {}) if name.startswith("reward/")]
    columns = [standardized([row.outcomes[name] for row in rows]) for name in names]
    spreads: list[float | None] = []
    for row in range(len(rows)):
        known = [value for column in columns if (value := column[row]) is not None]
        spreads.append(max(known) - min(known) if len(known) > 1 else None)
    return spreads


def standardized(values: Values) -> list[float | None]:
    """Return numbers less their mean, divided by their standard deviation; `None` for all if it is 0."""
    known = np.array([value for value in values if value is not None])
    if not len(known) or known.min() == known.max():  # the mean of equal numbers can be off by a rounding
        return [None] * len(values)
    mean, deviation = float(known.mean()), float(known.std())
    if not deviation > 0:  # the squares of tiny numbers are 0
        return [None] * len(values)
    return [None if value is None else (value - mean) / deviation for value in values]


def _scores(rows: Sequence[RecordedRow], sign: float = 1.0) -> Values:
    return [None if row.outcomes["score"] is None else sign * row.outcomes["score"] for row in rows]


class Kind(NamedTuple):
    """A way to stand out: what the number is, the number of each row of a record, and the bound that it exceeds."""

    title: str
    what: str
    measure: Callable[[Sequence[RecordedRow]], Values]
    bound: float = NEVER_BELOW


KINDS = (
    Kind(
        "Largest KL",
        "nats to the reference, summed over the response",
        lambda rows: [row.total("kl") for row in rows],
        0.0,
    ),
    Kind(
        "High reward, low judge",
        "standard deviations from the judge up to the score, a sign of reward hacking",
        highest_with_low_judge,
        1.0,
    ),
    Kind(
        "Worst value estimates",
        "mean distance between return and value",
        lambda rows: [row.value_error for row in rows],
        0.0,
    ),
    Kind(
        "Reward functions disagree",
        "standard deviations between the row's highest and lowest reward",
        disagreements,
        1.0,
    ),
    Kind(
        "Repetition",
        "share of 4-grams of tokens that occurred before",
        lambda rows: [row.repetition for row in rows],
        0.2,
    ),
    Kind(
        "Most clipped",
        "share of tokens whose ratio is clipped after the update",
        lambda rows: [row.clipped for row in rows],
        0.2,
    ),
    Kind("Highest scores", "score", _scores),
    Kind(LOWEST, "score", lambda rows: _scores(rows, -1.0)),
    Kind(
        "Unscored",
        "update of the row, which is not trained on",
        lambda rows: [float(row.update) if row.outcomes["score"] is None else None for row in rows],
    ),
)


class Highlights:
    """Collects the rows with the largest numbers of each kind, record by record."""

    def __init__(self) -> None:
        self.best: dict[str, list[Found]] = {kind.title: [] for kind in KINDS}

    def add(self, rows: Sequence[RecordedRow]) -> None:
        """Consider the rows of a record."""
        for kind in KINDS:
            for row, value in zip(rows, kind.measure(rows), strict=True):
                if value is not None and value > kind.bound:
                    self._keep(kind.title, [value, row.update, row.row, row.text[:LONGEST_TEXT]])

    def merge(self, best: Mapping[str, Sequence[Found]]) -> None:
        """Consider the `best` of other highlights."""
        for title, found in best.items():
            for entry in found:
                self._keep(title, entry)

    def lists(self) -> list[dict[str, Any]]:
        """Return the kinds that have rows, each with title, explanation and rows, the most striking first."""
        return [
            {
                "title": kind.title,
                "what": kind.what,
                "rows": [
                    {
                        "value": float(f"{-value if kind.title == LOWEST else value:.4g}"),
                        "update": update,
                        "row": row,
                        "text": text,
                    }
                    for value, update, row, text in sorted(self.best[kind.title], reverse=True)
                ],
            }
            for kind in KINDS
            if self.best[kind.title]
        ]

    def _keep(self, title: str, entry: Found) -> None:
        best = self.best[title]
        heapq.heappush(best, entry)
        if len(best) > SHOWN:
            heapq.heappop(best)
