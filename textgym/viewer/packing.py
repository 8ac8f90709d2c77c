"""Packed columns: numbers as text that gzip compresses well, for files that a browser reads.

A column of whole numbers is a string with one character a number: the code of the character is `BASE` for a missing
number, and otherwise `BASE + 1` plus the number in zigzag order (0, -1, 1, -2, 2, ...). A column with a larger number
than a character can say stays a list. Other numbers are rounded to multiples of a unit, which follows from their size.
`assets/data.js` reads the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BASE = 93
"""After the backslash, the last character that JSON would escape."""
LARGEST = (0xD7FF - BASE - 1) // 2
"""Later characters are surrogates."""
SMALLEST = 1e-300
"""Numbers that are nearer to 0 than this are packed as 0, since their unit would be no normal float."""

Column = Sequence[float | None]
Packed = str | list[int | None]


def pack(values: Sequence[int | None]) -> Packed:
    """Return whole numbers as a string, or as a list if one of them is too large."""
    if any(value is not None and abs(value) > LARGEST for value in values):
        return list(values)
    return "".join(chr(BASE if x is None else BASE + 1 + (2 * x if x >= 0 else -2 * x - 1)) for x in values)


def unpack(packed: Packed) -> list[int | None]:
    """Return what `pack` was given."""
    return _with_gaps(*_values(packed))


def pack_numbers(values: Column) -> dict[str, Any]:
    """Return numbers as multiples of a power of ten that is small beside them, without those that are not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    unit = _unit(finite)
    return {
        "unit": unit,
        "values": pack([round(v / unit) if v is not None and math.isfinite(v) else None for v in values]),
    }


def unpack_numbers(packed: dict[str, Any]) -> list[float | None]:
    """Return the numbers of `pack_numbers`, which have up to three significant digits."""
    unit = packed["unit"]
    values, known = _values(packed["values"])
    # 9 / 1000 is the float nearest to 0.009, and 9 * 0.001 is not, since 0.001 is rounded itself.
    return _with_gaps(values / float(round(1 / unit)) if unit < 1 else values * unit, known)


def _values(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Return packed whole numbers, and which of them are known."""
    if isinstance(packed, list):
        numbers = np.array([value or 0 for value in packed], dtype=object)  # of any size
        return numbers, np.array([value is not None for value in packed], dtype=bool)
    codes = np.frombuffer(packed.encode("utf-16-le"), dtype="<u2").astype(np.int64) - BASE - 1
    return np.where(codes % 2, -(codes + 1) // 2, codes // 2), codes >= 0


def _with_gaps(values: np.ndarray, known: np.ndarray) -> list[Any]:
    """Return numbers as a list, with `None` for those that are not known."""
    found: list[Any] = values.tolist()
    for place in np.flatnonzero(~known).tolist():
        found[place] = None
    return found


def pack_alternatives(alternatives: dict[str, Any], each: int) -> dict[str, Any]:
    """Return alternatives of policy and reference; those of the reference refer to the policy's, which are similar.

    Args:
        alternatives: For `policy` and `reference`, columns `piece` and `percent` with `each` entries a token. A piece
            of the reference that the policy has as its i-th is i, another one is `each` more than its index; the
            percents of common ones are differences.
        each: Number of alternatives of a token.
    """
    packed = {model: {name: pack(column) for name, column in own.items()} for model, own in alternatives.items()}
    if alternatives.keys() >= {"policy", "reference"}:
        pieces, percents = [], []
        for place, piece, percent in _reference(alternatives, each):
            pieces.append(piece + each if place is None else place % each)
            percents.append(percent if place is None else percent - alternatives["policy"]["percent"][place])
        packed["reference"] = {"piece": pack(pieces), "percent": pack(percents)}
    return packed


def unpack_alternatives(packed: dict[str, Any], each: int) -> dict[str, Any]:
    """Return what `pack_alternatives` was given."""
    found: dict[str, Any] = {model: {name: unpack(x) for name, x in own.items()} for model, own in packed.items()}
    if packed.keys() >= {"policy", "reference"}:
        policy, reference = found["policy"], found["reference"]
        for i, (piece, percent) in enumerate(zip(reference["piece"], reference["percent"], strict=True)):
            place = i // each * each + piece
            common = piece < each
            reference["piece"][i] = policy["piece"][place] if common else piece - each
            reference["percent"][i] = percent + policy["percent"][place] if common else percent
    return found


def _reference(alternatives: dict[str, Any], each: int) -> list[tuple[int | None, int, int]]:
    """Return each alternative of the reference, with its place among the policy's if it is there."""
    own, pieces = alternatives["reference"], alternatives["policy"]["piece"]
    found = []
    for i, (piece, percent) in enumerate(zip(own["piece"], own["percent"], strict=True)):
        start = i // each * each
        here = pieces[start : start + each]
        found.append((start + here.index(piece) if piece in here else None, piece, percent))
    return found


def _unit(values: Sequence[float]) -> float:
    """Return a power of ten: below a thirtieth of the root mean square, at most 0.01, and no number is over 20,000."""
    largest = max(map(abs, values), default=0.0)
    if largest < SMALLEST:
        return 1.0
    rms = largest * math.sqrt(sum((value / largest) ** 2 for value in values) / len(values))
    fine = min(math.floor(math.log10(rms / 30)), -2)
    return float(f"1e{max(fine, math.ceil(math.log10(largest / 20_000)))}")
