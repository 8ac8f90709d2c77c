"""Turns of conversations between strangers, and the replies to them.

Source: chitchat-dataset 0.9.0 (MIT; Myers et al., 2020), downloaded once (8 MB). Turns that look like contact details
and replies of more than 20 words are left out. The source does not mark offensive turns, so these are not filtered.
"""

from __future__ import annotations

import re
from functools import lru_cache

from textgym.data.corpora.sources import chitchat
from textgym.data.corpora.splits import check_split, splits_of
from textgym.data.overlap import key_of_text
from textgym.data.rows import Row

CONTACT = re.compile(r"@|https?://|www\.|\d{3}[-. ]?\d{3,}")
REPLIES_OF_A_CONVERSATION = 2


def reply_prompts(split: str) -> list[Row]:
    """Return rows with `prompt` (two turns on two lines, then `"A:"`) and `references` (the reply).

    Args:
        split: `"train"`, `"validation"` or `"test"`. All replies of a conversation, and conversations with a prompt in
            common up to punctuation, are in the same split.

    Raises:
        ValueError: If the split is unknown.
        FetchError: If the download or its checksum fails.
    """
    check_split(split)
    return [dict(row) for where, row in _replies() if where == split]


@lru_cache(maxsize=1)
def _replies() -> list[tuple[str, Row]]:
    """Return all rows with their splits."""
    beginnings, keys, rows = [], [], []
    for number, turns in enumerate(map(_plain, chitchat())):
        for row in _replies_of(turns):
            beginnings.append(" ".join(turns[:2]))
            keys.append([number, key_of_text(row["prompt"])])
            rows.append(row)
    return list(zip(splits_of(beginnings, keys), rows, strict=True))


def _plain(turns: list[str]) -> list[str]:
    return [turn for turn in turns if turn and not CONTACT.search(turn)]


def _replies_of(turns: list[str]) -> list[Row]:
    """Return the first replies of a conversation that are short and follow short turns."""
    rows = [
        {"prompt": f"A: {first}\nB: {second}\nA:", "references": reply}
        for first, second, reply in zip(turns, turns[1:], turns[2:], strict=False)
        if max(len(first.split()), len(second.split()), len(reply.split())) <= 20
    ]
    return rows[:REPLIES_OF_A_CONVERSATION]
