"""Rows of a record: the tokens and numbers of each response, and figures of whole responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textgym.viewer.records import Record

REPEATED_TOKENS = 4
"""Length of the n-grams whose repetition is measured."""


@dataclass(frozen=True)
class RecordedRow:
    """One response.

    Attributes:
        update: Number of the update.
        row: Its index in the record.
        prompt: Text of the prompt.
        text: Text of the response.
        pieces: Index of each token's piece.
        outcomes: Score, length, `stopped` and the rewards.
        numbers: Columns of the tokens that the policy generated.
        judges: Names of the outcomes that the policy is not trained on.
    """

    update: int
    row: int
    prompt: str
    text: str
    pieces: list[int]
    outcomes: dict[str, Any]
    numbers: dict[str, list[float | None]]
    judges: tuple[str, ...] = ()

    def total(self, name: str) -> float | None:
        """Return the sum of a column over the tokens; `None` if it is not recorded."""
        return sum(value or 0.0 for value in self.numbers[name]) if name in self.numbers else None

    @property
    def value_error(self) -> float | None:
        """Mean distance between return and value of the tokens; `None` without a critic or a score."""
        if "return" not in self.numbers or self.outcomes["score"] is None:
            return None
        pairs = zip(self.numbers["return"], self.numbers["value"], strict=True)
        errors = [abs(target - value) for target, value in pairs if target is not None and value is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def repetition(self) -> float:
        """Share of the n-grams of tokens that occurred in the response before."""
        grams = [tuple(self.pieces[i : i + REPEATED_TOKENS]) for i in range(len(self.pieces) - REPEATED_TOKENS + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    @property
    def clipped(self) -> float | None:
        """Share of clipped tokens; `None` for algorithms that clip none."""
        column = self.numbers.get("clipped")
        return sum(value or 0.0 for value in column) / len(column) if column else None


def rows_of(record: Record) -> list[RecordedRow]:
    """Return the rows of a record."""
    pieces, tokens, rows = record["pieces"], record["tokens"], record["rows"]
    mine = tokens.get("mine", [1] * len(tokens["piece"]))
    judges = tuple(name for name in record.get("judges", ()) if name in rows)
    found, start, first = [], 0, 0
    for row, length in enumerate(rows["length"]):
        end = start + length
        last = first + sum(mine[start:end])
        own = tokens["piece"][start:end]
        text = record["texts"].get(str(row))
        found.append(
            RecordedRow(
                record["update"],
                row,
                record["prompts"][rows["prompt"][row]],
                "".join(pieces[i] for i in own) if text is None else text,
                own,
                {name: column[row] for name, column in rows.items() if name != "prompt"},
                {name: column[first:last] for name, column in record["numbers"].items()},
                judges,
            )
        )
        start, first = end, last
    return found
