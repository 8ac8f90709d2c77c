"""Read rows of data from lists, files, data sets or attributes of modules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from textgym.data.importing import import_attribute
from textgym.errors import ConfigError, DataError

T = TypeVar("T")
E = TypeVar("E")

LONGEST_LINE = 10_000_000
"""Bytes of a line at most; a row of JSON takes a multiple of that in memory."""
Row = dict[str, Any]
"""A prompt and any other columns."""


def read_rows(
    source: Any, what: str, accepted: str, suffixes: tuple[str, ...] = (".jsonl",)
) -> Iterator[tuple[str, Any]]:
    """Yield each row, unchecked, with a description of its place for error messages.

    Args:
        source: A list, the path of a file with one of the suffixes, a `datasets.Dataset` or any other iterable of
            mappings with `column_names`, or the `"module:attribute"` of one of these or of a function that returns one.
        what: What the rows are, for error messages.
        accepted: A sentence that says which sources are accepted, for error messages.
        suffixes: `.jsonl` (one JSON value per line) or `.txt` (one string per line); empty lines are skipped.

    Raises:
        ValueError: If the source has another form, or a file is missing or malformed.
    """
    if isinstance(source, os.PathLike) or (isinstance(source, str) and source.endswith(suffixes)):
        yield from _read_file(Path(source), what, accepted, suffixes)
    elif isinstance(source, str):
        yield from _read_attribute(source, what, accepted, suffixes)
    elif isinstance(source, list | tuple) or _is_dataset(source):
        yield from ((f"row {index} of the {what}", row) for index, row in enumerate(source))
    else:
        raise ValueError(f"cannot read {what} from {named(source)}: {accepted}")


def encode_rows(encode: Callable[[Sequence[T]], list[E]], items: Sequence[T], places: Sequence[str]) -> list[E]:
    """Return `encode(items)`; if it fails, find the item that it fails for.

    Raises:
        DataError: If an item cannot be encoded; the message names its row.
    """
    try:
        return encode(items)
    except ConfigError:
        raise
    except ValueError:
        for item, place in zip(items, places, strict=True):
            try:
                encode([item])
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error
        raise


def named(source: Any) -> str:
    """Return how error messages refer to a source."""
    return repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"


def _is_dataset(source: Any) -> bool:
    """Return whether a source is like a `datasets.Dataset`; a `DatasetDict` is not, because it yields split names."""
    return isinstance(source, Iterable) and hasattr(source, "column_names") and not isinstance(source, Mapping)


def _read_attribute(name: str, what: str, accepted: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if ":" not in name:
        raise ValueError(f"cannot read {what} from {name!r}: {accepted}. To use a single string, put it in a list")
    found = import_attribute(name)
    found = found() if callable(found) else found
    if isinstance(found, str):  # it could be its own name, and reading it would never end
        raise ValueError(f"{name!r} is the string {found!r}: {accepted}")
    yield from ((f"{place} ({name!r})", row) for place, row in read_rows(found, what, accepted, suffixes))


def _read_file(path: Path, what: str, accepted: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if path.suffix not in suffixes:
        raise ValueError(f"cannot read {what} from {str(path)!r}: {accepted}")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} with {what}; the working folder is {str(Path.cwd())!r}")
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            place = f"line {number} of {str(path)!r}"
            text = _decoded(line, place)
            if text.strip():
                yield place, _parsed(text, place) if path.suffix == ".jsonl" else text.rstrip("\r\n")


def _lines(file: Any, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, none longer than `LONGEST_LINE`: a file without line breaks would fill the memory."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"line {number} of {str(path)!r} has more than {LONGEST_LINE:,} bytes: write one row a line, and cut "
                "longer texts"
            )
        yield line


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig")  # "-sig" because Windows editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error}): convert the file, such as with iconv") from error


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}): write one JSON object per line") from error
