"""Prompts: rows with a `prompt` and any further columns, from wherever they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textgym.data.corpora.sources import movie_snippets
from textgym.data.messages import is_messages
from textgym.data.rows import Row, named, read_rows

OPENINGS = Path(__file__).parent / "openings.txt"
ACCEPTED = (
    "prompts are a list of strings or of dicts with a 'prompt', the path of a .jsonl or .txt file, "
    "one split of a `datasets` data set, 'module:attribute', or 'openings'"
)


def load_prompts(prompts: Any) -> list[Row]:
    """Rows that all have a `prompt` and the same further columns, `None` where a row does not set one.

    Args:
        prompts: one of
            - a list of strings, or of dicts with a `prompt` key and any columns; a prompt may be a conversation, a
              list of messages with `role` and `content`;
            - the path of a `.jsonl` file (one such dict or string a line) or of a `.txt` file (one prompt a line);
              empty lines are skipped;
            - a `datasets.Dataset`, or any other iterable of mappings with `column_names`;
            - `"module:attribute"`, naming one of these or a function without arguments that returns one;
            - `"openings"`: the 200 beginnings of movie reviews that come with the package.

    >>> load_prompts(["Hello", {"prompt": "2 + 2 =", "answer": 4}])
    [{'prompt': 'Hello', 'answer': None}, {'prompt': '2 + 2 =', 'answer': 4}]

    Raises:
        ValueError: none of these, no rows, a missing or malformed file, or a row without a prompt; the message names
            the row or the line.
    """
    source = OPENINGS if isinstance(prompts, str) and prompts == "openings" else prompts
    rows = [_checked(row, place) for place, row in read_rows(source, "prompts", ACCEPTED, (".jsonl", ".txt"))]
    if not rows:
        raise ValueError(f"no prompts in {named(prompts)}: give at least one")
    columns = {name: None for row in rows for name in row}  # a dict, for it keeps the order
    return [{**columns, **row} for row in rows]


def snippet_prompts(split: str) -> list[Row]:
    """The first half of the words of each movie-review snippet of a split, fetched on first use.

    Args:
        split: `"train"`, `"policy"` or `"test"`, as `textgym.data.corpora.sources.Snippet.split` says.

    Returns:
        Rows with `prompt`, `text` (the whole snippet) and `rating` (-4 to 4). Snippets under 6 words are left out:
        half of one says too little to go on from.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, a wrong checksum, or a changed archive.
    """
    if split not in ("train", "policy", "test"):
        raise ValueError(f"there is no split {split!r}: use 'train', 'policy' or 'test'")
    return [
        {"prompt": " ".join(words[: len(words) // 2]), "text": snippet.text, "rating": snippet.rating}
        for snippet in movie_snippets()
        if snippet.split == split and len(words := snippet.text.split()) >= 6
    ]


def policy_snippets() -> list[Row]:
    """`snippet_prompts("policy")`, to train on with `prompts="textgym.data.prompts:policy_snippets"`."""
    return snippet_prompts("policy")


def _checked(row: Any, place: str) -> Row:
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is {row!r}: a row is a string or a dict with a 'prompt'")
    row = dict(row)
    if "prompt" not in row:
        raise ValueError(
            f"{place} has no 'prompt', only {list(row)}: rename the column that holds the text to 'prompt'"
        )
    prompt = row["prompt"]
    if is_messages(prompt):
        return {**row, "prompt": [dict(message) for message in prompt]}
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt of {place} is {prompt!r}: give it some text, or leave the row out")
    return row
