"""TextSpace: a space of strings with any characters."""

from __future__ import annotations

import string
from typing import Any

import gymnasium as gym


class TextSpace(gym.spaces.Text):
    """`gymnasium.spaces.Text` that contains all of Unicode; `sample` returns printable ASCII.

    Args:
        max_length: Maximum number of characters.

    >>> "naïve 🎬" in TextSpace(10), "eleven char" in TextSpace(10)
    (True, False)
    """

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        """Return whether `x` is a string of at most `max_length` characters."""
        return isinstance(x, str) and len(x) <= self.max_length


def longest_text(tokenizer: Any, num_tokens: int) -> int:
    """Return the maximum number of characters in a text of `num_tokens` tokens."""
    return num_tokens * max(len(token) for token in tokenizer.get_vocab())
