"""Examples for supervised fine-tuning: prompts and completions in TRL's formats, and their token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textgym.data.continuations import encode_continuations
from textgym.data.encoding import cut_beginning
from textgym.data.messages import Text, is_messages
from textgym.data.rows import named, read_rows

ACCEPTED = (
    "examples are a list of dicts with 'prompt' and 'completion', with 'messages', or with 'text', the path of a "
    ".jsonl file of such, one split of a `datasets` data set, or 'module:attribute'"
)
WORDS = re.compile(r"\s*\S+|\s+$")


class Example(NamedTuple):
    """Token ids of a prompt and of the completion to learn, at least one each."""

    prompt: list[int]
    completion: list[int]


def load_examples(examples: Any) -> list[tuple[Text, Text]]:
    """Return pairs of prompt and completion, as strings or conversations; the prompt of a `text` row is empty.

    Args:
        examples: any source that `read_rows` accepts. A row has the keys `prompt` and `completion` (so transcripts of
            environments are valid rows), or `messages`, whose last message is the completion, or `text`. Other keys
            are ignored.

    >>> load_examples([{"prompt": "2 + 2 =", "completion": " 4"}, {"text": "All of it."}])
    [('2 + 2 =', ' 4'), ('', 'All of it.')]

    Raises:
        ValueError: If the source or one of its rows has another form, or if there are no rows. The message names the
            row or the line.
    """
    rows = [_parts(row, place) for place, row in read_rows(examples, "examples", ACCEPTED)]
    if not rows:
        raise ValueError(f"there are no examples in {named(examples)}: give at least one")
    return rows


def split_pair(pair: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Return the prompt, the chosen completion and the rejected completion of a preference pair.

    If the pair has no `prompt`, the prompt is the longest common beginning of both texts, in whole words or messages.

    >>> split_pair({"chosen": "The film is good.", "rejected": "The film is great."})
    ('The film is', ' good.', ' great.')

    Raises:
        ValueError: If there is no prompt and the texts have no common beginning.
    """
    chosen, rejected = pair["chosen"], pair["rejected"]
    if pair.get("prompt"):
        return pair["prompt"], chosen, rejected
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"one text of a preference is a string and the other a conversation: {chosen!r} and {rejected!r}; use the "
            "same form for both"
        )
    # Whole words, because half a word would be tokenized differently than the word in the text.
    first, second = (WORDS.findall(text) if isinstance(text, str) else list(text) for text in (chosen, rejected))
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    shared = min(len(first), len(second)) if shared is None else shared
    if not shared:
        raise ValueError(
            f"{chosen!r} and {rejected!r} have no common beginning, so their prompt is unknown: pass it as 'prompt'"
        )
    if isinstance(chosen, str):
        return "".join(first[:shared]), "".join(first[shared:]), "".join(second[shared:])
    return first[:shared], first[shared:], second[shared:]


def encode_completions(
    pairs: Sequence[tuple[Text, Text]], tokenizer: Any, append_eos: bool = True, *, add_special_tokens: bool = True
) -> list[Example]:
    """Return the ids of prompts and completions, which together are those of the whole texts.

    Each completion ends with EOS, which is appended if it is missing, unless `append_eos` is false. Anything that a
    chat template adds after EOS is removed. If a prompt is empty, the first token of the text becomes the prompt.

    Args:
        pairs: Prompts and completions.
        tokenizer: The tokenizer.
        append_eos: Whether completions end with EOS.
        add_special_tokens: Whether strings get the tokenizer's BOS; false for strings that were rendered already.

    Raises:
        ValueError: If a pair has no token to learn, or if the chat template renders a conversation in a way that does
            not begin with its rendered prompt.
    """
    eos, name = tokenizer.eos_token_id, tokenizer.eos_token
    closed = [isinstance(completion, str) and completion.endswith(name) for _, completion in pairs]
    texts = [
        (prompt, completion.removesuffix(name) if isinstance(completion, str) else completion)
        for prompt, completion in pairs
    ]
    encoded = encode_continuations(tokenizer, texts, add_special_tokens=add_special_tokens)
    examples = []
    for pair, (prompt, completion), has_eos in zip(pairs, encoded, closed, strict=True):
        if any(not isinstance(text, str) for text in pair) and eos in completion:
            # Chat templates often render a line break after the last EOS. It is never generated, so it is not learned.
            completion = completion[: len(completion) - completion[::-1].index(eos)]
        elif has_eos or (append_eos and completion[-1:] != [eos]):
            completion = [*completion, eos]
        examples.append(_example(prompt, completion, pair))
    return examples


def shorten(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], max_length: int, bos: int | None = None
) -> list[Example]:
    """Shorten examples to `max_length` tokens: cut the beginnings of their prompts, then the ends of completions.

    At least one token of a prompt is kept, and BOS if there is room for another. All prompts are cut to one length.

    >>> shorten([[1, 2, 3], [1, 2, 3]], [[4], [5, 6]], max_length=4)
    [Example(prompt=[2, 3], completion=[4]), Example(prompt=[2, 3], completion=[5, 6])]
    """
    room = max(1, max_length - max(map(len, completions)))
    cut = [cut_beginning(prompt, room, bos) for prompt in prompts]
    return [
        Example(prompt, completion[: max_length - len(prompt)])
        for prompt, completion in zip(cut, completions, strict=True)
    ]


def _example(prompt: list[int], completion: list[int], pair: tuple[Text, Text]) -> Example:
    ids = [*prompt, *completion]
    size = max(1, len(prompt))  # a causal language model predicts no first token, so one has to be given
    if len(ids) <= size:
        raise ValueError(f"{pair!r} has no token to learn: give a prompt or more text")
    return Example(ids[:size], ids[size:])


def _parts(row: Any, place: str) -> tuple[Text, Text]:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{place} is {row!r}: an example is a dict with 'prompt' and 'completion', 'messages' or 'text'"
        )
    if {"prompt", "completion"} <= set(row):
        prompt, completion = _text(row, "prompt", place), _text(row, "completion", place)
        return prompt, completion
    if "messages" in row:
        return _last_answer(row["messages"], place)
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"'text' of {place} is {row['text']!r}: it must be a string")
        return "", row["text"]
    raise ValueError(f"{place} has the keys {sorted(row)}: it needs 'prompt' and 'completion', 'messages' or 'text'")


def _text(row: Mapping[str, Any], side: str, place: str) -> Text:
    text = row[side]
    if not isinstance(text, str) and not is_messages(text):
        raise ValueError(f"{side!r} of {place} is {text!r}: it must be a text or a list of messages")
    return text


def _last_answer(messages: Any, place: str) -> tuple[Text, Text]:
    if not is_messages(messages) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"'messages' of {place} is {messages!r}: it must be a list of at least two messages, the last of which is "
            "the assistant's; it is the completion, and the others are the prompt"
        )
    return list(messages[:-1]), list(messages[-1:])
