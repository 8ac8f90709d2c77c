"""TextSpace: strings in any script."""

from __future__ import annotations

import string
from typing import Any

import gymnasium as gym


class TextSpace(gym.spaces.Text):
    """`gymnasium.spaces.Text` of any characters: all of Unicode is in it, printable ASCII is what `sample` draws.

    Args:
        max_length: most characters.

    >>> "naïve 🎬" in TextSpace(10), "eleven char" in TextSpace(10)
    (True, False)
    """

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        """Whether it is a string that is short enough."""
        return isinstance(x, str) and len(x) <= self.max_length


def longest_text(tokenizer: Any, num_tokens: int) -> int:
    """Characters that so many tokens may hold."""
    return num_tokens * max(len(token) for token in tokenizer.get_vocab())
