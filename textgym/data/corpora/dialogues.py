"""Conversations between people who do not know each other, cut into what was said and the reply.

Source: chitchat-dataset 0.9.0 (MIT; Myers et al., 2020), fetched once (8 MB). Turns that look like contact details are
left out, and so are replies of more than 20 words. The source marks no turn as crude, so none is left out for that.
"""

from __future__ import annotations

import re
from functools import lru_cache

from textgym.data.corpora.sources import chitchat
from textgym.data.corpora.splits import check_split, split_of
from textgym.data.rows import Row

CONTACT = re.compile(r"@|https?://|www\.|\d{3}[-. ]?\d{3,}")
REPLIES_OF_A_CONVERSATION = 2


def reply_prompts(split: str) -> list[Row]:
    """Rows with `prompt` (two turns, a line each, then `"A:"`) and `references` (the reply).

    Args:
        split: `"train"`, `"validation"` or `"test"`, decided by the first two turns of the conversation.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
    """
    check_split(split)
    return [dict(row) for where, row in _replies() if where == split]


@lru_cache(maxsize=1)
def _replies() -> list[tuple[str, Row]]:
    return [(split_of(" ".join(turns[:2])), row) for turns in map(_plain, chitchat()) for row in _replies_of(turns)]


def _plain(turns: list[str]) -> list[str]:
    return [turn for turn in turns if turn and not CONTACT.search(turn)]


def _replies_of(turns: list[str]) -> list[Row]:
    """The first replies of a conversation that are short and follow something short."""
    rows = [
        {"prompt": f"A: {first}\nB: {second}\nA:", "references": reply}
        for first, second, reply in zip(turns, turns[1:], turns[2:], strict=False)
        if max(len(first.split()), len(second.split()), len(reply.split())) <= 20
    ]
    return rows[:REPLIES_OF_A_CONVERSATION]
