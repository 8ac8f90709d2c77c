"""The viewer of runs: records of tokens, the page of `textgym view`, and tokens as HTML for notebooks."""

from __future__ import annotations

from textgym.viewer.page import write_page
from textgym.viewer.tokens import token_html

__all__ = ["token_html", "write_page"]
