"""Token ids of texts and conversations: one BOS, no EOS at the end, and control tokens only where they were meant.

Conversations are rendered with the chat template. What their messages say is text: if it spells a control token, such
as `<|im_end|>`, it is read as these characters. A string is text, too, unless it begins with a control token, as the
output of a chat template does: then it was rendered already, and its control tokens count.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from textgym.data.messages import Messages, Text, apply_template, check_characters
from textgym.data.special_tokens import control_tokens, frame, framed, spells

NEIGHBOURS = ("\n", "a", ".")
"""Texts to encode another one after: tokenizers add a space in front of a text that follows nothing."""
PRIVATE_USE = range(0xE000, 0xF900)
"""Code points of the characters that stand in for control tokens."""


def encode(
    texts: Sequence[Text],
    tokenizer: Any,
    add_generation_prompt: bool = False,
    *,
    add_special_tokens: bool = True,
    add_eos: bool = False,
) -> list[list[int]]:
    """Return the token ids of strings and conversations.

    Args:
        texts: Strings and conversations.
        tokenizer: The tokenizer of the model that reads them.
        add_generation_prompt: Whether to open the assistant's next turn at the end of conversations. A last message of
            the assistant is left open instead, to be continued.
        add_special_tokens: Whether strings get what the tokenizer puts before a text, such as BOS, unless it is there
            already. If false, strings are taken as rendered: nothing is added, and their control tokens count.
        add_eos: Whether strings get what the tokenizer puts after a text, such as EOS. Encoders expect it; a causal
            language model would continue after the end.

    Raises:
        ValueError: If the tokenizer cannot render a conversation, or a text has a lone surrogate.
    """
    for text in _strings(texts):
        check_characters(text)
    rows: list[list[int]] = [[] for _ in texts]
    strings = {index: text for index, text in enumerate(texts) if isinstance(text, str)}
    controls = control_tokens(tokenizer)
    before, after = frame(tokenizer) if add_special_tokens else ([], [])

    # Strings that spell control tokens are read apart: only in the others may the tokenizer look for them.
    spelling = {index: add_special_tokens and spells(text, controls) for index, text in strings.items()}
    plain = [index for index in strings if not spelling[index]]
    if plain:
        encoded = tokenizer([strings[index] for index in plain], add_special_tokens=False).input_ids
        for index, ids in zip(plain, encoded, strict=True):
            rows[index] = list(ids)
    for index, text in strings.items():
        ids = encode_text(text, tokenizer, controls).ids if spelling[index] else rows[index]
        rows[index] = framed(ids, before, after if add_eos else ())

    for index, messages in enumerate(texts):
        if not isinstance(messages, str):
            rows[index] = Renderer(messages, tokenizer, controls).encode(messages, add_generation_prompt).ids
    return rows


def cut_beginning(ids: Sequence[int], length: int, bos: int | None) -> list[int]:
    """Return the last ids, at most `length`; a BOS at the beginning is kept.

    >>> cut_beginning([1, 5, 6, 7], 3, bos=1), cut_beginning([4, 5, 6, 7], 3, bos=1)
    ([1, 6, 7], [5, 6, 7])
    """
    if len(ids) <= length:
        return list(ids)
    kept = list(ids[:1]) if ids[0] == bos and length > 1 else []
    return [*kept, *ids[len(ids) - length + len(kept) :]]


class Encoded(NamedTuple):
    """A string, its token ids, and where in it each token ends; `None` if the tokenizer does not tell."""

    text: str
    ids: list[int]
    ends: list[int] | None


def encode_string(text: str, tokenizer: Any, **settings: Any) -> Encoded:
    """Encode a string without adding special tokens.

    Args:
        text: The string.
        tokenizer: The tokenizer.
        settings: More arguments of the tokenizer.

    Raises:
        ValueError: If the string has a lone surrogate.
    """
    check_characters(text)
    fast = getattr(tokenizer, "is_fast", False)  # mistral-common's backend does not say, and has no offsets
    if fast:
        settings["return_offsets_mapping"] = True
    encoded = tokenizer(text, add_special_tokens=False, **settings)
    ends = [end for _, end in encoded.offset_mapping] if fast else None
    return Encoded(text, list(encoded.input_ids), ends)


def encode_text(text: str, tokenizer: Any, controls: dict[str, int]) -> Encoded:
    """Encode a string in which no control token counts, without adding special tokens."""
    encoded = encode_string(text, tokenizer, split_special_tokens=True)
    read = set(encoded.ids) & (set(controls.values()) - {tokenizer.unk_token_id})
    if not read:
        return encoded

    # A unigram model has control tokens among its pieces, so that each has to be cut before the model reads it.
    spelled = "|".join(re.escape(token[0]) + f"(?={re.escape(token[1:])})" for token in controls if len(token) > 1)
    cuts = [0, *(match.end() for match in re.finditer(spelled, text)), len(text)]
    ids: list[int] = []
    for start, end in itertools.pairwise(cuts):
        ids += _following(text[start:end], tokenizer) if start else encode_string(text[:end], tokenizer).ids
    return Encoded(text, ids, None)


def _following(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that follows another one, without the space that a tokenizer puts in front."""
    for neighbour in NEIGHBOURS:
        alone = encode_string(neighbour, tokenizer).ids
        whole = encode_string(neighbour + text, tokenizer).ids
        if whole[: len(alone)] == alone:
            return whole[len(alone) :]
    return encode_string(text, tokenizer).ids


class Renderer:
    """Renders and encodes conversations whose messages may spell control tokens.

    A control token that a message spells is replaced by a private character while the template is rendered. Then a copy
    of the tokenizer reads the rendered text. The copy knows the template's control tokens by other private characters
    and takes all others for text.

    Args:
        messages: All messages that will be rendered.
        tokenizer: The tokenizer.
        controls: Its control tokens.
    """

    def __init__(self, messages: Messages, tokenizer: Any, controls: dict[str, int]) -> None:
        self.tokenizer, self.controls = tokenizer, controls
        strings = _strings(messages)
        spelled = [token for token in self.controls if any(token in text for text in strings)]

        used = set("".join(strings))
        free = [chr(code) for code in PRIVATE_USE if chr(code) not in used]
        self.masks = dict(zip(spelled, free, strict=False))
        self.marks = dict(zip(self.controls, free[len(spelled) :], strict=False))

    def encode(self, messages: Messages, add_generation_prompt: bool) -> Encoded:
        """Return rendered messages, or a string that stands for them, and their ids.

        Raises:
            ValueError: If the tokenizer cannot render them.
        """
        if not self.controls:
            open_end = add_generation_prompt or messages[-1]["role"] == "assistant"  # it closes no last answer
            ids = apply_template(messages, self.tokenizer, open_end, tokenize=True)
            return Encoded(self.tokenizer.decode(ids, skip_special_tokens=True), list(ids), None)
        masked = _replaced(messages, self.masks)
        text = apply_template(masked, self.tokenizer, add_generation_prompt, tokenize=False)
        if not self.masks:
            return encode_string(text, self.tokenizer)

        text = _replaced(text, self.marks)
        text = _replaced(text, {mask: token for token, mask in self.masks.items()})
        twin = _twin(self.tokenizer, tuple(self.marks.items()))
        encoded = encode_text(text, twin, self.controls)
        meant = {twin.convert_tokens_to_ids(mark): self.controls[token] for token, mark in self.marks.items()}
        return encoded._replace(ids=[meant.get(index, index) for index in encoded.ids])


@lru_cache(maxsize=4)
def _twin(tokenizer: Any, marks: tuple[tuple[str, str], ...]) -> Any:
    """Return a copy of a tokenizer that also knows its control tokens by private characters."""
    from tokenizers import AddedToken

    twin = copy.deepcopy(tokenizer)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    twin.add_tokens(
        [
            AddedToken(mark, lstrip=added[token].lstrip, rstrip=added[token].rstrip, normalized=False, special=False)
            for token, mark in marks
        ]
    )
    return twin


def _strings(value: Any) -> list[str]:
    """Return all strings in messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _strings(part)]
    return []


def _replaced(value: Any, replacements: Mapping[str, str]) -> Any:
    """Return a copy of messages in which strings are replaced, in the order given."""
    if isinstance(value, str):
        for old, new in replacements.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {key: _replaced(part, replacements) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(part, replacements) for part in value]
    return value
