"""Highlights: the recorded rows of a run that are worth a look first."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from textgym.viewer.rows import RecordedRow

SHOWN = 5
"""Rows of each kind."""
LOWEST = "Lowest scores"
LONGEST_TEXT = 160
"""Characters of a response that a link shows."""

Measure = Callable[[RecordedRow], float | None]


def _score(row: RecordedRow) -> float | None:
    score: float | None = row.outcomes["score"]
    return score


def _negative_score(row: RecordedRow) -> float | None:
    return None if row.outcomes["score"] is None else -row.outcomes["score"]


KINDS: tuple[tuple[str, str, Measure, float], ...] = (
    ("Largest KL", "nats to the reference, summed over the response", lambda row: row.total("kl"), 0.0),
    ("Worst value estimates", "mean distance between return and value", lambda row: row.value_error, 0.0),
    ("Repetition", "share of 4-grams of tokens that occurred before", lambda row: row.repetition, 0.2),
    ("Most clipped", "share of tokens whose ratio is clipped after the update", lambda row: row.clipped, 0.2),
    ("Highest scores", "score", _score, float("-inf")),
    (LOWEST, "score", _negative_score, float("-inf")),
)
"""Title, what the number is, the number, and the bound that it must exceed."""


class Highlights:
    """Collects the rows with the largest numbers of each kind, record by record."""

    def __init__(self) -> None:
        self.best: dict[str, list[tuple[float, int, int, str]]] = {title: [] for title, *_ in KINDS}
        self.disagreement: list[tuple[float, int, int, str]] = []
        self.unscored: list[tuple[float, int, int, str]] = []

    def add(self, rows: Sequence[RecordedRow]) -> None:
        """Consider the rows of a record."""
        for title, _, measure, bound in KINDS:
            for row in rows:
                value = measure(row)
                if value is not None and value > bound:
                    _keep(self.best[title], value, row)
        for row, value in zip(rows, disagreements(rows), strict=True):
            if value > 1:
                _keep(self.disagreement, value, row)
        for row in rows:
            if row.outcomes["score"] is None:
                _keep(self.unscored, float(row.update), row)

    def lists(self) -> list[dict[str, Any]]:
        """Return the kinds that have rows, each with title, explanation and rows, the most striking first."""
        kinds = [(title, what, self.best[title]) for title, what, *_ in KINDS]
        kinds.insert(
            2,
            (
                "Reward functions disagree",
                "standard deviations between the row's highest and lowest reward, a sign of reward hacking",
                self.disagreement,
            ),
        )
        kinds.append(("Unscored", "update of the row, which is not trained on", self.unscored))
        return [
            {
                "title": title,
                "what": what,
                "rows": [
                    {
                        "value": float(f"{-value if title == LOWEST else value:.4g}"),
                        "update": update,
                        "row": row,
                        "text": text,
                    }
                    for value, update, row, text in sorted(found, reverse=True)
                ],
            }
            for title, what, found in kinds
            if found
        ]


def disagreements(rows: Sequence[RecordedRow]) -> list[float]:
    """Return how far apart the rewards of each row are, in standard deviations of each function over the rows."""
    names = [name for name in (rows[0].outcomes if rows else {}) if name.startswith("reward/")]
    columns = []
    for name in names:
        values = [row.outcomes[name] for row in rows]
        known = [value for value in values if value is not None]
        deviation = statistics.pstdev(known) if known else 0.0
        if deviation > 0:
            mean = statistics.fmean(known)
            columns.append([None if value is None else (value - mean) / deviation for value in values])
    spreads = []
    for row in range(len(rows)):
        known = [column[row] for column in columns if column[row] is not None]
        spreads.append(max(known) - min(known) if len(known) > 1 else 0.0)
    return spreads


def _keep(best: list[tuple[float, int, int, str]], value: float, row: RecordedRow) -> None:
    heapq.heappush(best, (value, row.update, row.row, row.text[:LONGEST_TEXT]))
    if len(best) > SHOWN:
        heapq.heappop(best)
