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

    @property
    def cost(self) -> float:
        """In slots of narrow rows."""
        return self.rows * self.width * (1 + WIDTH_COST * self.width)


class Plan(NamedTuple):
    """Where N sequences go that may share their first tokens, their prompts, with others.

    Attributes:
        starts: where each begins when rows are laid end to end.
        shared: how many tokens it has in common with others, 0 if it is by itself.
        resumes: where it goes on after those.
        bundles: number of the bundle that it belongs to, from 0: sequences that share a prompt.
        rows: number of rows.
        width: slots of each.
    """

    starts: list[int]
    shared: list[int]
    resumes: list[int]
    bundles: list[int]
    rows: int
    width: int


def plan(sizes: Sequence[int], prompts: Sequence[int], alike: Sequence[Sequence[int]]) -> Plan:
    """The cheapest of several ways to share prompts, one of which is not to.

    A prompt that is laid out once takes fewer slots, but the responses to it have to stand in its row, which is wider.

    >>> plan([10, 10], prompts=[8, 8], alike=[[0, 1]])  # 8 tokens in common, and 2 of each
    Plan(starts=[0, 0], shared=[8, 8], resumes=[8, 10], bundles=[0, 0], rows=1, width=12)

    Args:
        sizes: tokens of each sequence.
        prompts: how many of them are its prompt.
        alike: the sequences of each prompt.
    """
    most, count = max(map(len, alike)), 1
    choices = []
    while count < 2 * most:  # sequences that share at a time: 1, 2, 4, ...
        bundles = [rows[i : i + count] for rows in alike for i in range(0, len(rows), count)]
        shared = [prompts[rows[0]] if len(rows) > 1 else 0 for rows in bundles]
        together = [n + sum(sizes[row] - n for row in rows) for n, rows in zip(shared, bundles, strict=True)]
        choices.append((lay_out(together), shared, bundles))
        count *= 2
    layout, shared, bundles = min(choices, key=lambda choice: choice[0].cost)
    places: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(sizes)
    for number, (start, common, rows) in enumerate(zip(layout.starts, shared, bundles, strict=True)):
        place = start + common
        for row in rows:
            places[row] = (start, common, place, number)
            place += sizes[row] - common
    starts, commons, resumes, numbers = (list(column) for column in zip(*places, strict=True))
    return Plan(starts, commons, resumes, numbers, layout.rows, layout.width)


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
        while Layout([], rows, width).cost < best.cost:
            layout = _fill(sizes, width)
            if layout.rows <= rows:
                best = layout
            width += max(1, width // 100)
    return best


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
