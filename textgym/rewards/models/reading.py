"""Token ids of texts as a reward model reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from textgym.data.messages import Text
from textgym.data.rows import encode_rows
from textgym.rewards.models.reward_model import RewardModel

WITHOUT_LIMIT = 2**31
"""Tokens that no text has."""


class Ids(NamedTuple):
    """Token ids that the model reads of a text, and how many it does not read."""

    kept: tuple[int, ...]
    lost: int


def ids_of_texts(texts: Iterable[tuple[Text, str]], reward_model: RewardModel) -> dict[str, Ids]:
    """Return the ids of each distinct text by its `text_key`.

    Args:
        texts: Each text, and the description of its row for error messages.
        reward_model: The model.
    """
    distinct: dict[str, tuple[Text, str]] = {}
    for text, place in texts:
        distinct.setdefault(text_key(text), (text, place))
    places = [place for _, place in distinct.values()]
    kept = encode_rows(reward_model.encode, [text for text, _ in distinct.values()], places)

    # Only a text that fills the window may have lost something.
    found = {}
    for (key, (text, _)), ids in zip(distinct.items(), kept, strict=True):
        full = len(ids) >= reward_model.max_length
        found[key] = Ids(tuple(ids), len(reward_model.encode([text], WITHOUT_LIMIT)[0]) - len(ids) if full else 0)
    return found


def text_key(text: Text) -> str:
    """Return a hashable key that is the same for equal texts only."""
    return text if isinstance(text, str) else json.dumps(text)
