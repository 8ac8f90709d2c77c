"""Completions to learn from: read in the formats of TRL, and turned into token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textgym.data.messages import Text, is_messages, render
from textgym.data.rows import named, read_rows

ACCEPTED = (
    "examples are a list of dicts with 'prompt' and 'completion', with 'messages', or with 'text', the path of a "
    ".jsonl file of such, one split of a `datasets` data set, or 'module:attribute'"
)
WORDS = re.compile(r"\s*\S+|\s+$")


class Example(NamedTuple):
    """Token ids of a prompt and of what is to be written after it, at least one each."""

    prompt: list[int]
    completion: list[int]


def load_examples(examples: Any) -> list[tuple[Text, Text]]:
    """Pairs of a prompt and a completion, strings or conversations; the prompt of a `text` row is empty.

    Args:
        examples: rows as `read_rows` reads them: `{"prompt", "completion"}`, as transcripts of environments are too,
            or `{"messages"}`, whose last one is the completion, or `{"text"}`. Other keys are left alone.

    >>> load_examples([{"prompt": "2 + 2 =", "completion": " 4"}, {"text": "All of it."}])
    [('2 + 2 =', ' 4'), ('', 'All of it.')]

    Raises:
        ValueError: none of these, no rows, or a row that is none; the message names the row or the line.
    """
    rows = [_parts(row, place) for place, row in read_rows(examples, "examples", ACCEPTED)]
    if not rows:
        raise ValueError(f"there are no examples in {named(examples)}: give at least one")
    return rows


def split_pair(pair: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected completion of a preference.

    Without a `prompt` it is what both texts start with: whole messages, or whole words.

    >>> split_pair({"chosen": "The film is good.", "rejected": "The film is great."})
    ('The film is', ' good.', ' great.')

    Raises:
        ValueError: there is no prompt and the texts begin differently.
    """
    chosen, rejected = pair["chosen"], pair["rejected"]
    if pair.get("prompt"):
        return pair["prompt"], chosen, rejected
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"of a preference one text is a string and one a conversation: {chosen!r} and {rejected!r}")
    first, second = (WORDS.findall(text) if isinstance(text, str) else list(text) for text in (chosen, rejected))
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    shared = min(len(first), len(second)) if shared is None else shared
    if not shared:
        raise ValueError(
            f"{chosen!r} and {rejected!r} do not begin alike, so their prompt is unknown: give it as 'prompt'"
        )
    if isinstance(chosen, str):
        return "".join(first[:shared]), "".join(first[shared:]), "".join(second[shared:])
    return first[:shared], first[shared:], second[shared:]


def encode_completions(pairs: Sequence[tuple[Text, Text]], tokenizer: Any, append_eos: bool = True) -> list[Example]:
    """Prompts and completions as ids, each tokenized alone, as a policy that goes on after a prompt sees them.

    A completion ends with EOS, which is appended where it is missing, unless `append_eos` is off; whatever a chat
    template writes after it is left out, since nothing is generated there. Where there is no prompt, the first token is
    given and the others follow it.

    Raises:
        ValueError: fewer than two tokens, or a chat template that does not begin a conversation with its prompt.
    """
    eos = tokenizer.eos_token_id
    texts = [_as_strings(prompt, completion, tokenizer) for prompt, completion in pairs]
    prompts: list[list[int]] = [[] for _ in texts]
    for special in (True, False):  # a template writes its special tokens itself, a tokenizer adds them
        rows = [i for i, text in enumerate(texts) if text.special == special]
        if rows:
            ids = tokenizer([texts[i].prompt for i in rows], add_special_tokens=special).input_ids
            for i, row in zip(rows, ids, strict=True):
                prompts[i] = list(row)
    completions = tokenizer([text.completion for text in texts], add_special_tokens=False).input_ids
    return [
        _example(prompt, _closed(list(completion), eos, text.special, append_eos), pair)
        for prompt, completion, text, pair in zip(prompts, completions, texts, pairs, strict=True)
    ]


def shorten(prompt: list[int], completions: Sequence[list[int]], max_length: int) -> list[Example]:
    """Completions of one prompt in at most `max_length` tokens: it loses its beginning, and only then they their end.

    >>> shorten([1, 2, 3], [[4], [5, 6]], max_length=4)
    [Example(prompt=[2, 3], completion=[4]), Example(prompt=[2, 3], completion=[5, 6])]
    """
    room = max(1, max_length - max(map(len, completions)))
    return [Example(prompt[-room:], completion[: max_length - len(prompt[-room:])]) for completion in completions]


class _Strings(NamedTuple):
    prompt: str
    completion: str
    special: bool


def _as_strings(prompt: Text, completion: Text, tokenizer: Any) -> _Strings:
    if isinstance(prompt, str) and isinstance(completion, str):
        return _Strings(prompt, completion, True)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    begin, whole = render(asked, tokenizer, add_generation_prompt=True), render([*asked, *said], tokenizer)
    if not whole.startswith(begin):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} writes {begin!r} before an answer and yet {whole!r} with "
            "it, so the answer cannot be told apart: give 'prompt' and 'completion' as strings"
        )
    return _Strings(begin, whole.removeprefix(begin), False)


def _closed(ids: list[int], eos: int, plain: bool, append_eos: bool) -> list[int]:
    if plain or eos not in ids:
        return ids if (ids and ids[-1] == eos) or not append_eos else [*ids, eos]
    return ids[: len(ids) - ids[::-1].index(eos)]


def _example(prompt: list[int], completion: list[int], pair: tuple[Text, Text]) -> Example:
    ids = [*prompt, *completion]
    if len(ids) < 2:
        raise ValueError(f"{pair!r} has no token to learn: give a prompt or some text")
    size = max(1, len(prompt))
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
            f"'messages' of {place} is {messages!r}: it must be a list of messages of which the last one, the "
            "assistant's, is learned and those before it are its prompt"
        )
    return list(messages[:-1]), list(messages[-1:])
