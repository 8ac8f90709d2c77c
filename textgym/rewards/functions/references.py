"""The column `references`: what is wanted of a row, one text or several alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

References = Sequence[str | Sequence[str] | None]


def listed(references: Sequence[Any]) -> list[list[str]]:
    """Return the alternatives of each row; none for a row without a reference.

    A row has no reference if it is `None`, as tables write missing cells, or an empty list. An alternative that is
    `None` is left out, because tables pad lists with it. An empty text is a reference: the wanted text is empty.

    Raises:
        ValueError: If a row is anything else.
    """
    return [_alternatives(row, number) for number, row in enumerate(references)]


def _alternatives(row: Any, number: int) -> list[str]:
    if row is None:
        return []
    if isinstance(row, str):
        return [row]
    texts = [text for text in row if text is not None] if isinstance(row, Iterable) else [row]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"the column 'references' of row {number} has {text!r}: give a text, a list of texts, or None"
            )
    return texts
