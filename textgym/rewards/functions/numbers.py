"""Numbers in texts: decimals, fractions and mixed numbers."""

from __future__ import annotations

import math
import re

DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d++)?"
NUMBER = re.compile(
    # A minus after a digit, a letter or a bracket subtracts, or joins as in 1990-95; elsewhere it is a sign.
    rf"(?P<sign>(?<![\w)\]}}])[-+\u2212])?"
    rf"(?:(?P<whole>\d++)[ \u00a0]++(?P<part>\d++)/(?P<parts>\d++)(?![\d/]|[.,]\d)"
    # Two numbers around a slash are a fraction; more of them are none, such as the date 11/28/2024.
    rf"|(?P<quotient>{DECIMAL}(?:[ \u00a0]?/[ \u00a0]?[-+\u2212]?{DECIMAL})*+))"
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*+\{([^{}]*+)\}\s*+\{([^{}]*+)\}")


def last_number(text: str) -> float | None:
    r"""Return the last number in a text, or `None` if there is none that a float can hold.

    Numbers may have thousands separators and exponents. A fraction, `7/2` or `\frac{7}{2}`, is one number, and so is a
    mixed number, `3 1/2`. Of more than two numbers between slashes, as in a date, the last one counts.

    >>> last_number("from 1,000 to 2.5e3"), last_number("about 7/2"), last_number("-3 1/2"), last_number("no")
    (2500.0, 3.5, -3.5, None)
    """
    numbers = list(NUMBER.finditer(LATEX_FRACTION.sub(_slashed, text)))
    return _value(numbers[-1]) if numbers else None


def _slashed(fraction: re.Match[str]) -> str:
    before = fraction.string[fraction.start() - 1 : fraction.start()]
    space = " " if before.isdigit() else ""  # of a mixed number
    return f"{space}{fraction[1]}/{fraction[2]}"


def _value(number: re.Match[str]) -> float | None:
    """Return the value of a match of `NUMBER`; `None` if it is infinite or a division by zero."""
    sign = -1.0 if number["sign"] in ("-", "\u2212") else 1.0
    if number["whole"] is not None:
        whole, part, parts = (float(number[name]) for name in ("whole", "part", "parts"))
        if part < parts:
            return _finite(sign * (whole + part / parts))
        return _quotient(part, parts)  # two numbers beside each other, and the fraction is the last
    values = [float(value.strip().replace(",", "").replace("\u2212", "-")) for value in number["quotient"].split("/")]
    if len(values) == 2:
        value = _quotient(*values)
        return None if value is None else sign * value
    return _finite(sign * values[-1]) if len(values) == 1 else _finite(values[-1])


def _quotient(numerator: float, denominator: float) -> float | None:
    return _finite(numerator / denominator) if denominator else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
