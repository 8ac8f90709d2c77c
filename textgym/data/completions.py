"""Examples for supervised fine-tuning: prompts and completions in TRL's formats, and their token ids."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from textgym.data.continuations import encode_continuations
from textgym.data.encoding import cut_beginning
from textgym.data.faults import (
    CUT_PROMPT,
    DUPLICATE,
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    EQUAL_SIDES,
    JOINED,
    NO_END,
    OTHER_TURNS,
    REPEATED_PROMPT,
    Faults,
)
from textgym.data.forms.pairs import OPENERS, split_pair
from textgym.data.forms.trees import answers_of_tree, with_whole_trees
from textgym.data.messages import Text, checked_text, conversation_with_tools, is_blank, is_messages, shortened
from textgym.data.preferences import PlacedPair
from textgym.data.rows import encode_rows, named, read_rows
from textgym.data.tools import tools_of
from textgym.errors import DataError

ACCEPTED = (
    "examples are a list of dicts with 'prompt' and 'completion', with 'messages', or with 'text', the path of a "
    ".jsonl file of such, one split of a `datasets` data set, or 'module:attribute'"
)
PROMPT_SHARE = 4
"""A prompt keeps at least this part of `max_length`, a quarter, before a completion is cut."""


class Example(NamedTuple):
    """Token ids of a prompt and of the completion to learn, at least one each."""

    prompt: list[int]
    completion: list[int]


class PlacedExample(NamedTuple):
    """Prompt and completion, and the description of their row for messages; the prompt of a `text` row is `None`."""

    place: str
    prompt: Text | None
    completion: Text


@dataclass(frozen=True)
class Reading:
    """How texts become token ids.

    Attributes:
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens of prompt and completion.
        append_eos: Whether completions end with EOS, which is appended if it is missing.
        add_special_tokens: Whether strings get the tokenizer's BOS; false for strings that were rendered already.
    """

    tokenizer: Any
    max_length: int
    append_eos: bool = True
    add_special_tokens: bool = True


def load_examples(examples: Any) -> list[tuple[Text, Text]]:
    """Return pairs of prompt and completion, as strings or conversations; the prompt of a `text` row is empty.

    Args:
        examples: any source that `read_rows` accepts. A row has the keys `prompt` and `completion` (so transcripts of
            environments are valid rows), or `messages`, whose last message is the completion, or `text`. Other keys
            are ignored. The best answers of a tree of conversations are examples, too.

    >>> load_examples([{"prompt": "2 + 2 =", "completion": " 4"}, {"text": "All of it."}])
    [('2 + 2 =', ' 4'), ('', 'All of it.')]

    Raises:
        DataError: If the source or one of its rows has another form, or if there are no rows. The message names the
            row or the line.
    """
    return [("" if row.prompt is None else row.prompt, row.completion) for row in placed_examples(examples)]


def placed_examples(examples: Any) -> list[PlacedExample]:
    """Load examples as `load_examples` does, with the place of each."""
    read = with_whole_trees(read_rows(examples, "examples", ACCEPTED))
    rows = [example for place, row in read for example in _examples_of(row, place)]
    if not rows:
        raise DataError(f"there are no examples in {named(examples)}: give at least one")
    return rows


def read_examples(rows: Sequence[PlacedExample], reading: Reading) -> tuple[list[Example], Faults]:
    """Return the token ids of examples as SFT learns them, and the faults of their rows."""
    faults = Faults("examples", len(rows))
    whole = _encoded([(row.place, row.prompt or "", row.completion) for row in rows], reading)
    texts = []
    for row, example in zip(rows, whole, strict=True):
        [text] = shorten([example.prompt], [example.completion], reading.max_length, reading.tokenizer.bos_token_id)
        texts.append(text)
        if row.prompt is not None and is_blank(row.prompt):
            faults.count(EMPTY_PROMPT, row.place)
        elif _repeats(row.completion, row.prompt):
            faults.count(REPEATED_PROMPT, row.place)
        if is_blank(row.completion):
            faults.count(EMPTY_COMPLETION, row.place)
        if are_joined(row.prompt, row.completion):
            faults.count(JOINED, row.place)
        count_cuts(faults, row.place, [example], [text])
    count_duplicates(faults, [row.place for row in rows], map(_frozen, texts))
    return texts, faults


def read_pairs(rows: Sequence[PlacedPair], reading: Reading) -> tuple[list[tuple[Example, Example]], Faults]:
    """Return the token ids of the chosen and the rejected text of pairs as DPO learns them, and their faults.

    Both texts of a pair are cut to the same prompt.
    """
    faults = Faults("preferences", len(rows))
    parts = [_parts_of_pair(row) for row in rows]
    sides = [(row.place, part[0], side) for row, part in zip(rows, parts, strict=True) for side in part[1:]]
    encoded = _encoded(sides, reading)
    pairs = []
    for row, chosen, rejected in zip(rows, encoded[::2], encoded[1::2], strict=True):
        prompts, completions = [chosen.prompt, rejected.prompt], [chosen.completion, rejected.completion]
        cut = shorten(prompts, completions, reading.max_length, reading.tokenizer.bos_token_id)
        pairs.append((cut[0], cut[1]))
        count_faulty_texts(faults, row)
        if cut[0] == cut[1]:
            faults.count(EQUAL_SIDES, row.place)
        if not (is_said(row.pair["chosen"]) and is_said(row.pair["rejected"])) and row.pair.get("prompt"):
            faults.count(OTHER_TURNS, row.place)
        count_cuts(faults, row.place, [chosen, rejected], cut)
    count_duplicates(faults, [row.place for row in rows], [(_frozen(one), _frozen(other)) for one, other in pairs])
    return pairs, faults


def _frozen(example: Example) -> Hashable:
    return tuple(example.prompt), tuple(example.completion)


def count_faulty_texts(faults: Faults, row: PlacedPair) -> None:
    """Count a pair with an empty prompt or text, one that repeats the prompt, or no white space between them."""
    prompt, texts = row.pair.get("prompt"), [row.pair["chosen"], row.pair["rejected"]]
    if prompt is not None and is_blank(prompt):
        faults.count(EMPTY_PROMPT, row.place)
    if any(is_blank(text) for text in texts):
        faults.count(EMPTY_COMPLETION, row.place)
    if any(_repeats(text, prompt) for text in texts):
        faults.count(REPEATED_PROMPT, row.place)
    if any(are_joined(prompt, text) for text in texts):
        faults.count(JOINED, row.place)


def are_joined(prompt: Text | None, completion: Text) -> bool:
    """Return whether a prompt of several words and a completion, read as one string, run into each other.

    >>> are_joined("Is it good?", "Yes."), are_joined("Is it good?", " Yes."), are_joined("2 + 2 =", "4")
    (True, False, False)
    """
    if not isinstance(prompt, str) or not isinstance(completion, str) or len(prompt.split()) < 2:
        return False
    # Other scripts than Latin may have no white space.
    return bool(re.search(r"[A-Za-z0-9.?!]$", prompt)) and bool(re.match(r"[A-Za-z0-9]", completion))


def count_cuts(faults: Faults, place: str, whole: Sequence[Example], cut: Sequence[Example]) -> None:
    """Count a row whose texts lost tokens of their prompt, or the end of their completion."""
    if any(len(text.prompt) < len(example.prompt) for text, example in zip(cut, whole, strict=True)):
        faults.count(CUT_PROMPT, place)
    if any(len(text.completion) < len(example.completion) for text, example in zip(cut, whole, strict=True)):
        faults.count(NO_END, place)


def count_duplicates(faults: Faults, places: Sequence[str], items: Iterable[Hashable]) -> None:
    """Count items of token ids that were there before."""
    seen: set[int] = set()
    for place, item in zip(places, items, strict=True):
        key = hash(item)  # the items themselves would take as much memory again
        if key in seen:
            faults.count(DUPLICATE, place)
        seen.add(key)


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
    closed = [isinstance(text, str) and text.endswith(name) for _, text in pairs]
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

    A prompt keeps its last quarter of `max_length` tokens, at least one, however long the completions are, and BOS if
    there is room for another. All prompts are cut to one length.

    >>> shorten([[1, 2, 3], [1, 2, 3]], [[4], [5, 6]], max_length=4)
    [Example(prompt=[2, 3], completion=[4]), Example(prompt=[2, 3], completion=[5, 6])]
    >>> shorten([[1, 2, 3, 4]], [[5] * 100], max_length=8)[0].prompt
    [3, 4]
    """
    room = max(1, max_length // PROMPT_SHARE, max_length - max(map(len, completions)))
    cut = [cut_beginning(prompt, room, bos) for prompt in prompts]
    return [
        Example(prompt, completion[: max_length - len(prompt)])
        for prompt, completion in zip(cut, completions, strict=True)
    ]


def _encoded(rows: Sequence[tuple[str, Text, Text]], reading: Reading) -> list[Example]:
    """Return the ids of (place, prompt, completion).

    Raises:
        DataError: If one of them cannot be encoded; the message names its row.
    """
    pairs = [(prompt, completion) for _, prompt, completion in rows]

    def encoded(some: Sequence[tuple[Text, Text]]) -> list[Example]:
        return encode_completions(
            some, reading.tokenizer, reading.append_eos, add_special_tokens=reading.add_special_tokens
        )

    return encode_rows(encoded, pairs, [place for place, *_ in rows])


def _example(prompt: list[int], completion: list[int], pair: tuple[Text, Text]) -> Example:
    ids = [*prompt, *completion]
    size = max(1, len(prompt))  # a causal language model predicts no first token, so one has to be given
    if len(ids) <= size:
        raise ValueError(f"{pair!r} has no token to learn: give a prompt or more text")
    return Example(ids[:size], ids[size:])


def _parts_of_pair(row: PlacedPair) -> tuple[Text, Text, Text]:
    try:
        return split_pair(row.pair)
    except ValueError as error:
        raise DataError(f"{row.place}: {error}") from error


def _repeats(completion: Text, prompt: Text | None) -> bool:
    """Return whether a completion begins with its prompt; one word may be repeated by chance."""
    if not isinstance(prompt, str) or not isinstance(completion, str) or len(prompt.split()) < 2:
        return False
    return completion.startswith(prompt) and completion != prompt


def _examples_of(row: Any, place: str) -> list[PlacedExample]:
    """Return the example of a row, or those of a tree of conversations."""
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), Mapping):
        return [PlacedExample(place, *parts) for parts in answers_of_tree(row["prompt"], place)]
    example = _placed(row, place)
    prompt, completion = example.prompt, example.completion
    tools = [] if prompt is None else tools_of(row, place)
    if prompt is None or (is_said(completion) and not tools):
        return [example]
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = conversation_with_tools(prompt, tools, place)
    return [PlacedExample(place, *parts) for parts in _turns(prompt, completion, place)]


def _turns(prompt: Text, completion: Text, place: str) -> list[tuple[Text, Text]]:
    """Return the turns of the assistant in a completion, each with all messages before it.

    Between them are turns that the model does not write, such as results of tools, and must not learn.
    """
    if isinstance(prompt, str) or isinstance(completion, str) or is_said(completion):
        return [(prompt, completion)]
    own = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
    if not own:
        raise DataError(f"'completion' of {place} has no message of the assistant: {shortened(completion)}")
    return [([*prompt, *completion[:i]], [completion[i]]) for i in own]


def is_said(completion: Text) -> bool:
    """Return whether the assistant says all of a completion."""
    return isinstance(completion, str) or all(message["role"] == "assistant" for message in completion)


def _placed(row: Any, place: str) -> PlacedExample:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place} is {shortened(row)}: an example is a dict with 'prompt' and 'completion', 'messages' or 'text'"
        )
    given = {key for key, value in row.items() if value is not None}
    if {"prompt", "completion"} <= set(row) and ({"prompt", "completion"} <= given or not {"messages", "text"} & given):
        texts = [checked_text(row[name], name, place) for name in ("prompt", "completion")]
        return PlacedExample(place, *_separated(texts[0], texts[1], place))
    if "messages" in given:
        return PlacedExample(place, *_last_answer(row["messages"], place))
    if "text" in given:
        if not isinstance(row["text"], str):
            raise DataError(f"'text' of {place} is {shortened(row['text'])}: it must be a string")
        return PlacedExample(place, None, checked_text(row["text"], "text", place))
    keys = sorted(map(str, given))
    hint = "; to learn the chosen texts of preferences, name them 'completion'" if "chosen" in given else ""
    raise DataError(f"{place} has the keys {keys}: it needs 'prompt' and 'completion', 'messages' or 'text'{hint}")


def _separated(prompt: Text, completion: Text, place: str) -> tuple[Text, Text]:
    """Return prompt and completion; a completion that is the whole conversation loses the prompt."""
    if isinstance(completion, str) or completion[0]["role"] not in OPENERS:
        return prompt, completion
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if completion[: len(asked)] != asked or len(completion) == len(asked):
        raise DataError(
            f"'completion' of {place} begins with {shortened(completion[0])}, and its 'prompt' is {shortened(prompt)}: "
            "a completion begins with the assistant's message, or repeats the whole prompt"
        )
    return asked, completion[len(asked) :]


def _last_answer(messages: Any, place: str) -> tuple[Text, Text]:
    if not is_messages(messages) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"'messages' of {place} is {shortened(messages)}: it must be a list of at least two messages, the last of "
            "which is the assistant's; it is the completion, and the others are the prompt"
        )
    messages = checked_text(messages, "messages", place)
    return messages[:-1], messages[-1:]
