"""Numbers in texts: decimals, fractions and mixed numbers."""

from __future__ import annotations

import math
import re
from fractions import Fraction

DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d++)?"
NUMBER = re.compile(
    # A minus after a digit, a letter or a bracket subtracts, or joins as in 1990-95; elsewhere it is a sign.
    rf"(?P<sign>(?<![\w)\]}}])[-+\u2212])?"
    rf"(?:(?P<whole>\d++)[ \u00a0]++(?P<part>\d++)/(?P<parts>\d++)(?![\d/]|[.,]\d)"
    # Two numbers around a slash are a fraction; more of them are none, such as the date 11/28/2024.
    rf"|(?P<quotient>{DECIMAL}(?:[ \u00a0]?/[ \u00a0]?[-+\u2212]?{DECIMAL})*+))"
)
LONGEST = 400
"""Characters of a number that is read exactly; a longer one is rounded to a float."""
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*+\{([^{}]*+)\}\s*+\{([^{}]*+)\}")


def last_number(text: str) -> float | None:
    r"""Return the last number in a text, or `None` if there is none that a float can hold.

    Numbers may have thousands separators and exponents. A fraction, `7/2` or `\frac{7}{2}`, is one number, and so is a
    mixed number, `3 1/2`. Of more than two numbers between slashes, as in a date, the last one counts.

    >>> last_number("from 1,000 to 2.5e3"), last_number("about 7/2"), last_number("-3 1/2"), last_number("no")
    (2500.0, 3.5, -3.5, None)
    """
    value = last_fraction(text)
    return None if value is None else float(value)


def last_fraction(text: str) -> Fraction | None:
    """Return the number of `last_number` exactly, because a float does not hold every whole number above 2^53.

    >>> last_fraction("in all 9,007,199,254,740,993"), last_fraction("0.10")
    (Fraction(9007199254740993, 1), Fraction(1, 10))
    """
    numbers = list(NUMBER.finditer(LATEX_FRACTION.sub(_slashed, text)))
    return _value(numbers[-1]) if numbers else None


def _slashed(fraction: re.Match[str]) -> str:
    before = fraction.string[fraction.start() - 1 : fraction.start()]
    space = " " if before.isdigit() else ""  # of a mixed number
    return f"{space}{fraction[1]}/{fraction[2]}"


def _value(number: re.Match[str]) -> Fraction | None:
    """Return the value of a match of `NUMBER`; `None` if a float cannot hold it, or it is a division by zero."""
    sign = -1 if number["sign"] in ("-", "\u2212") else 1
    if number["whole"] is not None:
        whole, part, parts = (_exact(number[name]) for name in ("whole", "part", "parts"))
        if whole is not None and part is not None and parts is not None and part < parts:
            return _held(sign * (whole + part / parts))
        return _quotient(part, parts)  # two numbers beside each other, and the fraction is the last
    values = [_exact(value.strip().replace(",", "").replace("\u2212", "-")) for value in number["quotient"].split("/")]
    value = _quotient(*values) if len(values) == 2 else values[-1]
    return value if value is None or len(values) > 2 else sign * value


def _exact(number: str) -> Fraction | None:
    """Return the value of a decimal; `None` if a float cannot hold it."""
    near = float(number)
    if not math.isfinite(near):
        return None
    # A long number or a far exponent would take minutes; that of a float other than 0 is not far.
    return Fraction(number) if near and len(number) <= LONGEST else Fraction(near)


def _quotient(numerator: Fraction | None, denominator: Fraction | None) -> Fraction | None:
    return _held(numerator / denominator) if numerator is not None and denominator else None


def _held(value: Fraction) -> Fraction | None:
    """Return a value, or `None` if a float cannot hold it."""
    try:
        float(value)
    except OverflowError:
        return None
    return value
