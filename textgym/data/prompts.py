"""Load prompts: rows with a `prompt` and any other columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textgym.data.corpora.sources import movie_snippets
from textgym.data.messages import checked_text, conversation_with_tools, is_messages
from textgym.data.overlap import key_of_text
from textgym.data.rows import Row, named, read_rows
from textgym.data.tools import tools_of

OPENINGS = Path(__file__).parent / "openings.txt"
ACCEPTED = (
    "prompts are a list of strings or of dicts with a 'prompt', the path of a .jsonl or .txt file, "
    "one split of a `datasets` data set, 'module:attribute', or 'openings'"
)

RESERVED = (
    "prompts",
    "completion",
    "completions",
    "prompt_ids",
    "completion_ids",
    "completions_ids",
    "text_ids",
    "log_metric",
    "log_extra",
    "trainer_state",
)
"""What reward functions and transcripts are handed under these names is of the episode, so no column has one."""


def load_prompts(prompts: Any) -> list[Row]:
    """Load rows that all have a `prompt` and the same columns; missing values are `None`.

    Args:
        prompts: One of
            - a list of strings, or of dicts with the key `prompt` and any others; a prompt may be a conversation, that
              is, a list of messages with `role` and `content`, and the column `tools` has JSON schemas of tools
              that may be called in it;
            - the path of a `.jsonl` file (one such dict or string per line) or of a `.txt` file (one prompt per line);
              empty lines are skipped;
            - a `datasets.Dataset`, or any other iterable of mappings with `column_names`;
            - `"module:attribute"`, the name of one of these or of a function without arguments that returns one;
            - `"openings"`, the 200 openings of movie reviews in the package.

    >>> load_prompts(["Hello", {"prompt": "2 + 2 =", "answer": 4}])
    [{'prompt': 'Hello', 'answer': None}, {'prompt': '2 + 2 =', 'answer': 4}]

    Raises:
        ValueError: If the source has another form, a file is missing or malformed, there are no rows, or a row has no
            prompt or a reserved column. The message names the row or the line.
    """
    source = OPENINGS if isinstance(prompts, str) and prompts == "openings" else prompts
    rows = [_checked(row, place) for place, row in read_rows(source, "prompts", ACCEPTED, (".jsonl", ".txt"))]
    if not rows:
        raise ValueError(f"no prompts in {named(prompts)}: give at least one")
    columns = {name: None for row in rows for name in row}  # a dict, because it keeps the order
    return [{**columns, **row} for row in rows]


def snippet_prompts(split: str) -> list[Row]:
    """Return prompts that are the first half of the words of movie-review snippets; they are downloaded on first use.

    Args:
        split: `"train"`, `"policy"` or `"test"`, as in `textgym.data.corpora.sources.Snippet.split`.

    Returns:
        Rows with `prompt`, `text` (the whole snippet) and `rating` (-4 to 4). Snippets with fewer than 6 words are left
        out, because half of one is too short to continue from, and so are test prompts that other splits have, too.

    Raises:
        ValueError: If the split is unknown.
        FetchError: If the download or its checksum fails.
    """
    if split not in ("train", "policy", "test"):
        raise ValueError(f"there is no split {split!r}: use 'train', 'policy' or 'test'")
    halves = [
        (" ".join(words[: len(words) // 2]), snippet)
        for snippet in movie_snippets()
        if len(words := snippet.text.split()) >= 6
    ]
    elsewhere = {key_of_text(half) for half, s in halves if s.split != "test"} if split == "test" else set()
    return [
        {"prompt": half, "text": snippet.text, "rating": snippet.rating}
        for half, snippet in halves
        if snippet.split == split and key_of_text(half) not in elsewhere
    ]


def policy_snippets() -> list[Row]:
    """Return `snippet_prompts("policy")`; for training with `prompts="textgym.data.prompts:policy_snippets"`."""
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
    if taken := [name for name in RESERVED if name in row]:
        raise ValueError(
            f"{place} has a column {taken[0]!r}, and reward functions get something else under this name: rename the "
            "column, or leave it out"
        )
    prompt = row["prompt"]
    if is_messages(prompt):
        checked = checked_text(prompt, "prompt", place)
        return {**row, "prompt": conversation_with_tools(checked, tools_of(row, place), place)}
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt of {place} is {prompt!r}: give it some text, or leave the row out")
    return row
