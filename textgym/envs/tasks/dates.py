"""textgym/Dates-v0: write a text that has a date in it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from textgym.data.messages import Text, plain
from textgym.data.rows import Row
from textgym.envs.tasks.base import Settings, TaskEnv, TaskVectorEnv

DATE = re.compile(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)")
SHAPE = "dddd-dd-dd"
OPENINGS = ("It was on", "The film came out on", "We met on", "The story begins on", "I was born on", "See you on")


class DatesEnv(TaskEnv):
    """A date in the form 2024-02-29, on the embedded model: a toy after a reward of RL4LMs that no config there uses.

    ## Description
    A sentence has been begun that a date may follow. Nothing is fetched.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 16 + 16`.

    ## Rewards
    On the last token how much of a date the text has (`date_share`): tenths for the characters of the longest beginning
    of one, 1 for one that the calendar has. RL4LMs (`sentences_with_dates`) pays for complete ones only, which the
    embedded model never writes by chance. No reference.

    Metrics: the reward itself; `has_date`, the share of texts with a date, as RL4LMs pays but for days that no calendar
    has.

    ## Starting State
    One of 6 openings. There are no splits, since the opening does not count.

    ## Episode End
    The end-of-text token, or 16 tokens.

    ## Arguments
    Args:
        kwargs: arguments of `TextEnv`; the defaults are described above.
    """

    metrics = ("textgym.envs.tasks.dates:date_share", "textgym.envs.tasks.dates:has_date")

    @classmethod
    def settings(cls, **kwargs: Any) -> Settings:
        """The arguments of `TextEnv`."""
        return {
            "prompts": date_prompts(),
            "tokenizer": "tiny",
            "reward": date_share,
            "max_prompt_tokens": 16,
            "max_new_tokens": 16,
            **kwargs,
        }


class DatesVectorEnv(TaskVectorEnv):
    """Many rows of `DatesEnv`, see there."""

    single = DatesEnv


def has_date(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the text has a date of the calendar.

    >>> has_date(["born on 2024-02-29.", "2023-02-29", "12024-02-29"])
    [1.0, 0.0, 0.0]
    """
    return [float(any(map(_is_day, DATE.findall(text)))) for text in plain(completions)]


def date_share(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the text has a date of the calendar, else a tenth for each character of a beginning of one, 0.9 at most.

    >>> date_share(["on 2024-02-29", "on 2023-02-29", "in 2024-0", "in 84", "never"])
    [1.0, 0.9, 0.6, 0.2, 0.0]
    """
    texts = plain(completions)
    return [1.0 if found else _longest_beginning(text) for text, found in zip(texts, has_date(texts), strict=True)]


def date_prompts() -> list[Row]:
    """Rows with `prompt`."""
    return [{"prompt": opening} for opening in OPENINGS]


def _longest_beginning(text: str) -> float:
    shape = re.sub(r"[0-9]", "d", re.sub(r"[^0-9-]", " ", text))
    longest = max(length for length in range(len(SHAPE) + 1) if SHAPE[:length] in shape)
    return min(longest, 9) / 10


def _is_day(date: str) -> bool:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        return False
    return True
