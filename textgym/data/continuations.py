"""A completion as the continuation of its prompt: its text, and its token ids.

A completion that is decoded alone may lose its first space (sentencepiece, WordPiece), and one that is encoded alone
may get other tokens than in its text. So prompt and completion are decoded, and encoded, together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from textgym.data.encoding import NEIGHBOURS, Encoded, Renderer, encode_string, encode_text
from textgym.data.messages import Text
from textgym.data.special_tokens import control_tokens, frame, framed, spells

HALF = "\ufffd"
"""What bytes decode to that are no whole character."""
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the most tokens that it can have."""


def decode_continuation(tokenizer: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """Return the text that a completion adds to its prompt, without special tokens.

    A character whose last bytes are missing at the end is left out.
    """
    text = added_text(tokenizer, prompt_ids, completion_ids)
    if not text.endswith(HALF) or _is_whole(tokenizer, completion_ids):
        return text
    for dropped in range(1, min(LONGEST_CHARACTER, len(completion_ids) + 1)):
        shorter = added_text(tokenizer, prompt_ids, completion_ids[: len(completion_ids) - dropped])
        if not shorter.endswith(HALF):
            return shorter
    return text  # its bytes are no text at all, so nothing is missing


def added_text(tokenizer: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """Return the text that a completion adds to its prompt; parts of a character at its end show as `HALF`."""
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    # A completion may change the end of its prompt, for example by the missing bytes of a character.
    return str(whole[_common(before, whole) :])


def ids_of_text(tokenizer: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int], text: str) -> list[int]:
    """Return the beginning of a completion's ids that says a text, with other ids for a token that the text cuts."""
    found = None
    for length in range(len(completion_ids), -1, -1):
        said = added_text(tokenizer, prompt_ids, completion_ids[:length])
        if said == text:
            found = length  # the shortest one; special tokens at the end say nothing
        elif found is not None:
            break
        elif text.startswith(said):
            kept = list(completion_ids[:length])
            return [*kept, *encode_after(tokenizer, [*prompt_ids, *kept], text[len(said) :])]
    return list(completion_ids[:found])


class Continuation(NamedTuple):
    """Token ids of a prompt and its completion; together they are those of the whole text."""

    prompt: list[int]
    completion: list[int]


def encode_continuations(
    tokenizer: Any, pairs: Sequence[tuple[Text, Text]], *, add_special_tokens: bool = True
) -> list[Continuation]:
    """Encode prompts and completions as whole texts, and split the ids where the prompt's text ends.

    A token that begins in the prompt and ends in the completion belongs to the completion.

    Args:
        tokenizer: The tokenizer.
        pairs: Prompts, which are strings or conversations, with completions, which are strings or further messages.
        add_special_tokens: As for `textgym.data.encoding.encode`.

    Raises:
        ValueError: If the tokenizer cannot render a conversation, or renders it in a way that does not begin with its
            rendered prompt.
    """
    controls = control_tokens(tokenizer)
    before = frame(tokenizer)[0] if add_special_tokens else []
    encoded = []
    for prompt, completion in pairs:
        if isinstance(prompt, str) and isinstance(completion, str):
            as_text = add_special_tokens and spells(prompt + completion, controls)
            begin, whole = (
                encode_text(text, tokenizer, controls) if as_text else encode_string(text, tokenizer)
                for text in (prompt, prompt + completion)
            )
            opening = before
        else:
            begin, whole = _conversation(tokenizer, prompt, completion, controls)
            opening = []
        size = _border(tokenizer, begin, whole)
        encoded.append(Continuation(framed(whole.ids[:size], opening), whole.ids[size:]))
    return encoded


def encode_after(tokenizer: Any, context_ids: Sequence[int], text: str) -> list[int]:
    """Return the ids of a text that is appended to a context whose ids are given."""
    controls = control_tokens(tokenizer)
    as_text = spells(text, controls)
    choices = []
    for neighbour in ("", *NEIGHBOURS):
        alone = encode_string(neighbour, tokenizer).ids
        joined = neighbour + text
        whole = (encode_text(joined, tokenizer, controls) if as_text else encode_string(joined, tokenizer)).ids
        if whole[: len(alone)] == alone:
            choices.append(whole[len(alone) :])
            if added_text(tokenizer, context_ids, choices[-1]) == text:
                return choices[-1]
    return choices[0]  # a tokenizer such as WordPiece cannot say every text


def _conversation(tokenizer: Any, prompt: Text, completion: Text, controls: dict[str, int]) -> tuple[Encoded, Encoded]:
    """Return a prompt, and it with its completion, as the chat template renders them."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    renderer = Renderer([*asked, *said], tokenizer, controls)
    begin = renderer.encode(asked, add_generation_prompt=True)
    whole = renderer.encode([*asked, *said], add_generation_prompt=False)
    if not whole.text.startswith(begin.text):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} renders the prompt as {begin.text!r}, but the "
            f"conversation as {whole.text!r}, which does not begin with it, so the completion cannot be separated: "
            "give 'prompt' and 'completion' as strings"
        )
    return begin, whole


def _border(tokenizer: Any, prompt: Encoded, whole: Encoded) -> int:
    """Return the number of tokens of a whole text that end within its prompt."""
    if whole.ids[: len(prompt.ids)] == prompt.ids:
        return len(prompt.ids)
    if whole.ends is not None:
        return next((i for i, end in enumerate(whole.ends) if end > len(prompt.text)), len(whole.ids))
    same = _common(prompt.ids, whole.ids)
    text = tokenizer.decode(prompt.ids)
    while same < len(whole.ids) and text.startswith(tokenizer.decode(whole.ids[: same + 1])):
        same += 1
    return same


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _is_whole(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Return whether ids end in a replacement character that was meant, and not in a part of another character."""
    for size in range(1, LONGEST_CHARACTER + 1):
        last = list(ids[-size:])
        if encode_after(tokenizer, [], tokenizer.decode(last, skip_special_tokens=True)) == last:
            return True
    return False
