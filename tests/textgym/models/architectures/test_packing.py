"""Layouts of packed sequences: everyone has a place of its own, and few slots stay empty."""

from __future__ import annotations

import random

import pytest

from textgym.models.architectures.packing import lay_out


def lengths(number: int, seed: int = 0) -> list[int]:
    """As of prompts of 16 tokens whose responses end by chance, at 28 at the latest."""
    draw = random.Random(seed)
    return [16 + min(28, 1 + int(draw.expovariate(1 / 18))) for _ in range(number)]


@pytest.mark.parametrize("number", [1, 2, 3, 16, 200])
def test_no_slot_is_taken_twice_and_no_sequence_is_cut(number: int) -> None:
    sizes = lengths(number)
    starts, rows, width = lay_out(sizes)
    taken = [slot for start, size in zip(starts, sizes, strict=True) for slot in range(start, start + size)]
    assert len(set(taken)) == len(taken) == sum(sizes)
    assert max(taken) < rows * width
    assert all(start // width == (start + size - 1) // width for start, size in zip(starts, sizes, strict=True))


def test_few_slots_stay_empty() -> None:
    empty = []
    for seed in range(50):
        sizes = lengths(16, seed)
        _, rows, width = lay_out(sizes)
        empty.append(1 - sum(sizes) / (rows * width))
    assert sum(empty) / len(empty) < 0.06  # 0.15 in rows as wide as the longest


def test_sequences_of_one_length_have_a_row_each() -> None:
    assert lay_out([64] * 16) == ([64 * row for row in range(16)], 16, 64)


def test_long_sequences_are_not_laid_side_by_side_for_a_few_slots() -> None:
    """Attention over a row of 2,000 would cost more than the 60 slots that it saves."""
    assert lay_out([1000, 1000, 970, 970]).width == 1000
