"""Text of models and data, made safe to show: terminals, Markdown and HTML read some characters as commands.

Everything that prints prompts or completions, or writes them where people look at them, goes through this module.
"""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

# Control characters except tab and line feed, marks that change the direction of writing, line separators, lone
# surrogates (which cannot be printed), and tags (which cannot be seen).
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|~$#!&@]")


def printable(text: str) -> str:
    r"""Return a text in which characters that command a terminal are spelled out; tabs and line feeds stay.

    >>> print(printable("\x1b[2Jgone\rnot"))
    \x1b[2Jgone\rnot
    """
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def markdown_cell(text: str) -> str:
    r"""Return a text for a cell of a Markdown table, where it is shown as it is.

    >>> print(markdown_cell("a | b\n![x](http://y) <b>"))
    a \| b \!\[x\](http\://y) \<b\>
    """
    escaped = _MARKDOWN.sub(lambda match: f"\\{match[0]}", printable(text).replace("\n", " "))
    return escaped.replace("://", "\\://")  # otherwise an address becomes a link


def html_text(text: str) -> str:
    """Return a text for the content of an HTML element, where it is shown as it is.

    >>> html_text("<script>")
    '&lt;script&gt;'
    """
    return html.escape(printable(text))


def rich_text(text: str, style: str = "") -> Text:
    """Return a text for the terminal, in which rich finds no markup such as `[red]`."""
    from rich.text import Text

    return Text(printable(text), style)


def show_all_characters(*streams: Any) -> None:
    """Let streams spell out characters that their encoding lacks, as Windows code pages do, instead of failing."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none, and takes all characters
            stream.reconfigure(errors="backslashreplace")
