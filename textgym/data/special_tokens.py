"""Special tokens: which a tokenizer has, which it reads in strings, and which it puts around a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens of a tokenizer with their ids, longer ones first."""
    tokens = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
    if reads_control_tokens(tokenizer):
        added = tokenizer.added_tokens_decoder.items()
        tokens |= {token.content: index for index, token in added if token.special}
    return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens that a tokenizer reads in strings, with their ids, longer ones first."""
    return special_tokens(tokenizer) if reads_control_tokens(tokenizer) else {}


def reads_control_tokens(tokenizer: Any) -> bool:
    """Return whether a special token in a string is read as that token; for mistral-common it is text."""
    if not tokenizer.all_special_tokens:
        return True
    token = str(tokenizer.all_special_tokens[0])
    return tokenizer.convert_tokens_to_ids(token) in tokenizer(token, add_special_tokens=False).input_ids


def spells(text: str, controls: dict[str, int]) -> bool:
    """Return whether a string is text that spells a control token.

    A string that begins with a control token is no such text: it is the output of a chat template.

    >>> spells("What is <s>?", {"<s>": 1}), spells("<s>[INST] What? [/INST]", {"<s>": 1})
    (True, False)
    """
    return not text.startswith(tuple(controls)) and any(token in text for token in controls)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before a text, such as BOS, and after it, such as EOS."""
    inner = list(tokenizer("a", add_special_tokens=False).input_ids)
    outer = list(tokenizer("a").input_ids)
    starts = [i for i in range(len(outer) - len(inner) + 1) if outer[i : i + len(inner)] == inner]
    start = starts[0] if inner and starts else outer[:1].count(tokenizer.bos_token_id)
    return outer[:start], outer[start + len(inner) :]


def framed(ids: Sequence[int], before: Sequence[int], after: Sequence[int] = ()) -> list[int]:
    """Return ids between those that a tokenizer adds, unless a rendered text has these already.

    >>> framed([5, 6], [1], [2]), framed([1, 5, 6, 2], [1], [2])
    ([1, 5, 6, 2], [1, 5, 6, 2])
    """
    opening = [] if list(ids[: len(before)]) == list(before) else before
    ending = [] if list(ids[len(ids) - len(after) :]) == list(after) else after
    return [*opening, *ids, *ending]
