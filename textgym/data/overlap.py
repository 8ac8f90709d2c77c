"""Which rows belong together: those with the same prompt up to case, punctuation and white space, or the same group.

Such rows are never split between training and evaluation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from textgym.data.messages import Text, content

WORD = re.compile(r"\w+")
END = re.compile(r"[:?!.\n](?=\s|$)")
"""Where a prompt may end: texts without a separate prompt often begin their answers with the same words."""


@lru_cache(maxsize=2**14)  # a text may be in many pairs
def key_of_text(text: str) -> str:
    """Return the words of a text in lower case; texts that differ only in punctuation have the same key.

    >>> key_of_text("Hi,  there!") == key_of_text("hi there")
    True
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text.strip()


def key_of_prompt(prompt: Text) -> str:
    """Return the key of a prompt; a conversation has that of its messages without the system's."""
    if isinstance(prompt, str):
        return key_of_text(prompt)
    asked = [message for message in prompt if message["role"] not in ("system", "developer")]
    return key_of_text(content(asked or prompt))


def keys_of_pair(pair: Mapping[str, Any]) -> list[Hashable]:
    """Return what connects a preference pair with others: its group, and its prompt or else its whole texts.

    Without a separate prompt, it is the common beginning of both texts, up to the last end of a sentence or line.
    """
    keys: list[Hashable] = [] if pair.get("group") is None else [("group", pair["group"])]
    if pair.get("prompt"):
        return [*keys, *contents_of_pair(pair)]
    if keys:  # texts that are compared in groups may be in several groups
        return keys
    prompt = key_of_text(common_beginning(pair["chosen"], pair["rejected"]))
    return [*contents_of_pair(pair), *([("prompt", prompt)] if prompt else [])]


def contents_of_pair(pair: Mapping[str, Any]) -> list[Hashable]:
    """Return the key of a pair's prompt, or without one those of its whole texts."""
    if pair.get("prompt"):
        return [("prompt", key_of_prompt(pair["prompt"]))]
    return [("text", key_of_text(content(pair[side]))) for side in ("chosen", "rejected")]


def common_beginning(first: Text, second: Text) -> str:
    """Return the common beginning of two texts, up to the last end of a sentence or line in it, if there is one.

    >>> common_beginning("Is it good? It is great.", "Is it good? It is bad.")
    'Is it good?'
    """
    one, other = (re.findall(r"\s*\S+", content(text)) for text in (first, second))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    shared = "".join(one[:same])
    ends = list(END.finditer(shared))
    return shared[: ends[-1].end()] if ends else shared


def clusters(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Return the indices of rows in clusters: rows that share a key, directly or through other rows.

    >>> clusters([["a"], ["b"], ["a", "c"], ["c"]])
    [[0, 2, 3], [1]]
    """
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_row: dict[Hashable, int] = {}
    for row, row_keys in enumerate(keys):
        for key in row_keys:
            parent[root(row)] = root(first_row.setdefault(key, row))
    found: dict[int, list[int]] = {}
    for row in range(len(keys)):
        found.setdefault(root(row), []).append(row)
    return list(found.values())


def clusters_of_pairs(pairs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the indices of preference pairs that belong together, see `keys_of_pair`.

    Implicit prompts that begin with another whole prompt of at least three words are taken for that prompt and the
    first words of an answer.
    """
    keys = [keys_of_pair(pair) for pair in pairs]
    prompts = {key[1] for row in keys for key in row if isinstance(key, tuple) and key[0] == "prompt"}
    for pair, row in zip(pairs, keys, strict=True):
        if pair.get("prompt") or pair.get("group") is not None:
            continue
        words = key_of_text(common_beginning(pair["chosen"], pair["rejected"])).split()
        beginnings = (" ".join(words[:count]) for count in range(3, len(words)))
        row += [("prompt", beginning) for beginning in beginnings if beginning in prompts]
    return clusters(keys)
