"""Text renderings of an episode."""

from __future__ import annotations

import warnings
from typing import Any

from textgym.display import printable, rich_text
from textgym.viewer.tokens import token_html

RENDER_MODES = ("ansi", "human", "html")


def checked_render_mode(render_mode: str | None) -> str | None:
    """The mode, or `None` with a warning for one that text has no use for, such as the `"rgb_array"` SB3 asks for."""
    if render_mode is None or render_mode in RENDER_MODES:
        return render_mode
    warnings.warn(f"render_mode={render_mode!r} is ignored: text renders as one of {RENDER_MODES}", stacklevel=4)
    return None


def render(mode: str | None, transcript: dict[str, Any], score: float | None) -> str | None:
    """The episode as a string (`"ansi"`, `"html"`), or printed (`"human"`)."""
    prompt, completion = transcript["prompt"], transcript["completion"]
    note = "" if score is None else f"score {score:+.3f}"
    if mode == "ansi":
        return f"{printable(prompt)}\x1b[1m{printable(completion)}\x1b[0m" + (f"\n{note}" if note else "")
    if mode == "html":
        return token_html([completion], prompt=prompt, note=note)
    if mode == "human":
        from rich import print as rich_print
        from rich.text import Text

        parts = rich_text(prompt), rich_text(completion, "bold"), (f"  [{note}]" if note else "", "dim")
        rich_print(Text.assemble(*parts))
    return None
