"""textgym/IncreasingNumbers-v0: write numbers, each greater than the last."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textgym.data.messages import Text, plain
from textgym.data.rows import Row
from textgym.envs.tasks.base import Settings, TaskEnv, TaskVectorEnv


@dataclass(frozen=True)
class IncreasingNumbers:
    """The share of a text's words that are the rising numbers it begins with; words that are no numbers count as words.

    Attributes:
        min_words: a text of fewer words is taken for one of so many, so that a single number is worth little.

    >>> IncreasingNumbers(min_words=4)(["1 2 3 4", "1 2 2 3", "well 1 2 3", "7"])
    [1.0, 0.5, 0.75, 0.25]
    """

    min_words: int

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Scores completions."""
        return [self._share(text.split()) for text in plain(completions)]

    def _share(self, words: list[str]) -> float:
        numbers = [number for word in words if (number := _number(word)) is not None]
        rising = list(itertools.takewhile(lambda pair: pair[0] < pair[1], itertools.pairwise(numbers)))
        return min(len(numbers), len(rising) + 1) / max(len(words), self.min_words)


class IncreasingNumbersEnv(TaskEnv):
    """Numbers that rise, on the embedded model (RL4LMs' `synthetic_generate_increasing_numbers`).

    ## Description
    The prompt is a few rising numbers, `"3 4 5"`; what it says does not count. Nothing is fetched.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 16 + 20`.

    ## Rewards
    On the last token the share of words in the rising run that the text's numbers begin with (`IncreasingNumbers`),
    from 0 to 1. No reference.

    Metric: the reward itself, with `min_words=10`.

    ## Starting State
    One of 30 prompts: `"1 2 3"` to `"30 31 32"`. There are no splits, since the prompt does not count.

    ## Episode End
    The end-of-text token, or 20 tokens.

    ## Arguments
    Args:
        min_words: a text of fewer words is taken for one of so many; RL4LMs' `min_tokens` is twice this.
        kwargs: arguments of `TextEnv`; the defaults are described above.
    """

    metrics = (IncreasingNumbers(min_words=10),)

    @classmethod
    def settings(cls, *, min_words: int = 10, **kwargs: Any) -> Settings:
        """The arguments of `TextEnv`."""
        return {
            "prompts": number_prompts(),
            "tokenizer": "tiny",
            "reward": IncreasingNumbers(min_words),
            "max_prompt_tokens": 16,
            "max_new_tokens": 20,
            **kwargs,
        }


class IncreasingNumbersVectorEnv(TaskVectorEnv):
    """Many rows of `IncreasingNumbersEnv`, see there."""

    single = IncreasingNumbersEnv


def number_prompts() -> list[Row]:
    """Rows with `prompt`: three numbers that follow each other."""
    return [{"prompt": f"{first} {first + 1} {first + 2}"} for first in range(1, 31)]


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" and "inf" are words
