"""Where to lay sequences of unequal length side by side, so that hardly a slot stays empty."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

TRIES = 8
WIDTH_COST = 1e-3
"""What one more slot in a row adds to the cost of each slot in it, as a share of that of the layers' matrices.

Each slot attends to all of its row, with 2 d multiplications for each, beside the 12 d² of a layer's matrices: that is
1/1152 for the narrow model that textgym brings along, d = 192, and less for wider ones.
"""


class Layout(NamedTuple):
    """`starts`, where each sequence begins when rows are laid end to end; the number of `rows`; the slots of each."""

    starts: list[int]
    rows: int
    width: int


def lay_out(sizes: Sequence[int]) -> Layout:
    """The cheapest of several layouts: narrow rows stay empty beside long sequences, wide ones cost attention.

    >>> lay_out([5, 3, 2])
    Layout(starts=[0, 5, 8], rows=2, width=5)
    >>> lay_out([5, 4, 4])  # rows of 5 would leave two slots empty
    Layout(starts=[0, 5, 9], rows=1, width=13)
    """
    best = _fill(sizes, max(sizes))
    most = best.rows
    for rows in sorted({most * number // TRIES for number in range(1, TRIES)} - {0}, reverse=True):
        width = max(best.width, math.ceil(sum(sizes) / rows))
        while _cost(rows, width) < _cost(best.rows, best.width):
            layout = _fill(sizes, width)
            if layout.rows <= rows:
                best = layout
            width += max(1, width // 100)
    return best


def _cost(rows: int, width: int) -> float:
    return rows * width * (1 + WIDTH_COST * width)


def _fill(sizes: Sequence[int], width: int) -> Layout:
    """Each sequence, the longest first, goes where it leaves least room (best-fit decreasing)."""
    starts, rows = [0] * len(sizes), 0
    rooms: list[tuple[int, int]] = []  # slots left and number of each row that has some, in order
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        place = bisect.bisect_left(rooms, (size, 0))
        if place < len(rooms):
            left, row = rooms.pop(place)
        else:
            left, row = width, rows
            rows += 1
        starts[index] = (row + 1) * width - left
        if left > size:
            bisect.insort(rooms, (left - size, row))
    return Layout(starts, rows, width)
