"""Prompts: rows with a `prompt` and any further columns, from wherever they come."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from textgym.data.importing import import_attribute
from textgym.data.sources import movie_snippets

Row = dict[str, Any]
OPENINGS = Path(__file__).parent / "openings.txt"
ACCEPTED = (
    "prompts are a list of strings or of dicts with a 'prompt', the path of a .jsonl or .txt file, "
    "one split of a `datasets` data set, 'module:attribute', or 'openings'"
)


def load_prompts(prompts: Any) -> list[Row]:
    """Rows that all have a `prompt` and the same further columns, `None` where a row does not set one.

    Args:
        prompts: one of
            - a list of strings, or of dicts with a `prompt` key and any columns;
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
    rows = [_checked(row, place) for place, row in _read(prompts)]
    if not rows:
        raise ValueError(f"no prompts in {_named(prompts)}: give at least one")
    columns = {name: None for row in rows for name in row}  # a dict, for it keeps the order
    return [{**columns, **row} for row in rows]


def snippet_prompts(split: str) -> list[Row]:
    """The first half of the words of each movie-review snippet of a split, fetched on first use.

    Args:
        split: `"train"`, `"policy"` or `"test"`, as `textgym.data.sources.Snippet.split` says.

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


def _read(prompts: Any) -> Iterator[tuple[str, Any]]:
    """Unchecked rows, each with the words that an error names it by."""
    if isinstance(prompts, str) and prompts == "openings":
        prompts = OPENINGS
    if isinstance(prompts, os.PathLike) or (isinstance(prompts, str) and prompts.endswith((".jsonl", ".txt"))):
        yield from _read_file(Path(prompts))
    elif isinstance(prompts, str):
        yield from _read_attribute(prompts)
    elif isinstance(prompts, list | tuple) or _is_dataset(prompts):
        yield from ((f"row {index} of the prompts", row) for index, row in enumerate(prompts))
    else:
        raise ValueError(f"cannot read prompts from {_named(prompts)}: {ACCEPTED}")


def _is_dataset(prompts: Any) -> bool:
    """Whether it is like a `datasets.Dataset`; a `DatasetDict` is not, for it yields the names of its splits."""
    return isinstance(prompts, Iterable) and hasattr(prompts, "column_names") and not isinstance(prompts, Mapping)


def _read_attribute(name: str) -> Iterator[tuple[str, Any]]:
    if ":" not in name:
        raise ValueError(f"cannot read prompts from {name!r}: {ACCEPTED}. A single prompt is a list of one")
    found = import_attribute(name)
    found = found() if callable(found) else found
    if isinstance(found, str):  # it could name itself
        raise ValueError(f"{name!r} is the string {found!r}: {ACCEPTED}")
    yield from ((f"{place} ({name!r})", row) for place, row in _read(found))


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"cannot read prompts from {str(path)!r}: {ACCEPTED}")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} with prompts; the working folder is {str(Path.cwd())!r}")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"line {number} of {str(path)!r}"
                yield place, _parsed(line, place) if path.suffix == ".jsonl" else line.rstrip("\n")


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{place} is not JSON ({error}): write one object a line, such as {{"prompt": "..."}}'
        ) from error


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
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt of {place} is {prompt!r}: give it some text, or leave the row out")
    return row


def _named(prompts: Any) -> str:
    return repr(os.fspath(prompts)) if isinstance(prompts, str | os.PathLike) else f"a {type(prompts).__name__}"
