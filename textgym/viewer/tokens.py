"""Tokens as HTML: coloured by a quantity, with all numbers under the pointer, without a script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from textgym.display import html_text, printable
from textgym.errors import ConfigError

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DIVERGING = ((8, 81, 156), (107, 174, 214), (247, 247, 247), (253, 174, 97), (191, 91, 0))
CENTRED = {"kl": 0.0, "advantage": 0.0, "reward": 0.0, "ratio": 1.0}
"""Quantities with a centre, which blue and orange show best; all others are from viridis."""

Alternatives = Sequence[tuple[str, float]]


def token_html(
    tokens: Sequence[str],
    numbers: Mapping[str, Sequence[float | None]] | None = None,
    *,
    color: str | None = None,
    prompt: str = "",
    mask: Sequence[bool] | None = None,
    alternatives: Mapping[str, Sequence[Alternatives]] | None = None,
    note: str = "",
) -> str:
    """Return a text as HTML, for notebooks: `IPython.display.HTML(token_html(...))`.

    All texts are escaped, and control characters are spelled out.

    >>> token_html(["Hello", "<b>"], {"kl": [0.0, 1.0]}).count("<span")
    2

    Args:
        tokens: Texts of the tokens.
        numbers: For each quantity, such as `log_prob` or `advantage`, a number a token; `None` or NaN if there is none.
        color: The quantity that colours the tokens; the first one by default.
        prompt: Text before the tokens, which is grey.
        mask: Whether the policy generated each token; the others are grey.
        alternatives: For `"policy"`, `"reference"` or others, the most likely tokens in place of each token, with their
            probabilities.
        note: A line below the text, such as the score.

    Raises:
        ConfigError: If a column has another length than the tokens, or there is no quantity named `color`.
    """
    numbers = numbers or {}
    columns: dict[str, Sequence[object]] = {
        **numbers,
        **(alternatives or {}),
        **({} if mask is None else {"mask": mask}),
    }
    for title, column in columns.items():
        if len(column) != len(tokens):
            raise ConfigError(f"{title!r} has {len(column)} entries for {len(tokens)} tokens: give one a token")
    if color is not None and color not in numbers:
        raise ConfigError(f"color={color!r} is none of the numbers {list(numbers)}")
    name = color or next(iter(numbers), None)
    colours = [None] * len(tokens) if name is None else colours_of(numbers[name], CENTRED.get(name))

    spans = []
    for i, token in enumerate(tokens):
        lines = [f"{quantity} {_shown(column[i])}" for quantity, column in numbers.items()]
        for model, likely in (alternatives or {}).items():
            lines += [f"{model}: " + ", ".join(f"{text!r} {share:.0%}" for text, share in likely[i])]
        style = "opacity:.6" if mask is not None and not mask[i] else _style(colours[i])
        spans.append(f'<span style="{style}" title="{_attribute(lines)}">{html_text(token)}</span>')
    before = f'<span style="opacity:.6">{html_text(prompt)}</span>' if prompt else ""
    below = f'<div style="opacity:.7">{html_text(note)}</div>' if note else ""
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{before}{"".join(spans)}</div>{below}'


def colours_of(values: Sequence[float | None], centre: float | None = None) -> list[tuple[int, int, int] | None]:
    """Return the colour of each number between the smallest and the largest; `None` for those that are not finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    stops = VIRIDIS if centre is None else DIVERGING
    if centre is not None:
        reach = max(abs(low - centre), abs(high - centre))
        low, high = centre - reach, centre + reach
    width = high - low
    return [
        None
        if value is None or not math.isfinite(value)
        else _between(stops, (value - low) / width if 0 < width < math.inf else 0.5)
        for value in values
    ]


def _between(stops: Sequence[tuple[int, int, int]], share: float) -> tuple[int, int, int]:
    place = share * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return red, green, blue


def _style(colour: tuple[int, int, int] | None) -> str:
    if colour is None:
        return ""
    red, green, blue = colour
    text = "#111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
    return f"background:rgb({red},{green},{blue});color:{text}"


def _shown(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.4g}"


def _attribute(lines: Sequence[str]) -> str:
    """Return lines for an attribute in double quotes."""
    return html.escape(printable("\n".join(lines))).replace("\n", "&#10;")
