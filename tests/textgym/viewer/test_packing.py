"""Packed columns give back what was packed, to three digits."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.viewer.packing import (
    LARGEST,
    pack,
    pack_alternatives,
    pack_numbers,
    unpack,
    unpack_alternatives,
    unpack_numbers,
)

WHOLE = st.none() | st.integers(-(10**9), 10**9) | st.integers(-LARGEST, LARGEST)


@settings(max_examples=25)
@given(st.lists(WHOLE))
def test_whole_numbers_come_back(values: list[int | None]) -> None:
    assert unpack(json.loads(json.dumps(pack(values)))) == values


def test_no_character_needs_an_escape_or_is_a_surrogate() -> None:
    packed = pack([None, *range(-LARGEST, LARGEST + 1)])
    assert isinstance(packed, str)
    assert json.dumps(packed, ensure_ascii=False) == f'"{packed}"'
    assert packed.encode("utf-8").decode("utf-8") == packed


@settings(max_examples=25)
@given(st.lists(st.floats(width=32), min_size=1))
def test_numbers_come_back_rounded_beside_their_size(values: list[float]) -> None:
    found = unpack_numbers(json.loads(json.dumps(pack_numbers(values))))
    finite = [value for value in values if math.isfinite(value)]
    rms = math.hypot(*finite) / math.sqrt(max(len(finite), 1))
    for value, back in zip(values, found, strict=True):
        if not math.isfinite(value):
            assert back is None
            continue
        assert back is not None
        largest = max(map(abs, finite))
        assert abs(back - value) <= max(rms / 60, largest / 4000) * 1.001 + 1e-300


@settings(max_examples=25)
@given(st.lists(st.floats(-300, 300), min_size=1))
def test_numbers_of_usual_size_have_two_decimals(values: list[float]) -> None:
    found = unpack_numbers(pack_numbers(values))
    largest = max(map(abs, values))
    assert all(
        abs(back - value) <= max(0.0051, largest / 4000 * 1.001)
        for value, back in zip(values, found, strict=True)
        if back is not None
    )


@pytest.mark.parametrize("values", [[0.009, 0.003], [1e-21, 3e-21], [3.0], [2e5, -4e5, None], []])
def test_short_numbers_come_back_as_they_were(values: list[float | None]) -> None:
    assert unpack_numbers(pack_numbers(values)) == values


def test_a_number_that_is_almost_zero_is_zero() -> None:
    assert unpack_numbers(pack_numbers([5e-324, -1e-310])) == [0.0, 0.0]


def test_numbers_in_a_list_are_read_like_those_in_a_string() -> None:
    numbers = [9, None, -3, 0]
    assert unpack_numbers({"unit": 0.001, "values": numbers}) == unpack_numbers(
        {"unit": 0.001, "values": pack(numbers)}
    )


def test_whole_numbers_of_any_size_come_back() -> None:
    numbers = [2**70, None, -1, 0]
    assert unpack(pack(numbers)) == numbers


ENTRY = st.tuples(st.integers(0, 20), st.integers(0, 100))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.lists(ENTRY, min_size=3, max_size=3), st.lists(ENTRY, min_size=3, max_size=3))))
def test_alternatives_come_back(tokens: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]) -> None:
    alternatives = {
        model: {
            "piece": [piece for token in tokens for piece, _ in token[side]],
            "percent": [percent for token in tokens for _, percent in token[side]],
        }
        for side, model in enumerate(("policy", "reference"))
    }
    assert unpack_alternatives(pack_alternatives(alternatives, 3), 3) == alternatives
    alone = {"reference": alternatives["reference"]}
    assert unpack_alternatives(pack_alternatives(alone, 3), 3) == alone
