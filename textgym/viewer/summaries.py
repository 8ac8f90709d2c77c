"""Summaries: what the index of a page needs of a record, kept beside the record's data so that it is read once.

A record never changes, but resuming a run removes the records after its checkpoint and writes others. So a summary
names the file, size and time of its record, and is made again if these differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from textgym.errors import DamagedFolderError
from textgym.viewer.highlights import Highlights
from textgym.viewer.records import read_record
from textgym.viewer.rows import RecordedRow, rows_of

Summary = dict[str, Any]
"""`record`, which record it is of; `figures` and `best` rows of it; `prompts`, the key of each prompt; and `rows`, the
index of each row's prompt."""


def summary_of(path: Path) -> Summary:
    """Read a record and return its summary.

    Raises:
        DamagedFolderError: If it is incomplete or no record, or a newer version of textgym wrote it.
    """
    stamp = stamp_of(path)
    record = read_record(path, alternatives=False)
    try:
        rows = rows_of(record)
        highlights = Highlights()
        highlights.add(rows)
        return {
            "record": stamp,
            "figures": {**_figures(rows), "update": record["update"], "episodes": record["episodes"]},
            "best": highlights.best,
            "prompts": [prompt_key(prompt) for prompt in record["prompts"]],
            "rows": record["rows"]["prompt"],
        }
    except (LookupError, TypeError) as error:
        raise DamagedFolderError(f"it is no whole record: {type(error).__name__} {error}") from error


def stamp_of(path: Path) -> list[Any]:
    """Return what a record is recognised by, with the version that reads it.

    Raises:
        OSError: If there is no such file.
    """
    status = path.stat()
    return [_version(), str(path), status.st_size, status.st_mtime_ns]


@cache
def _version() -> str:
    return version("textgym")


def read_summary(path: Path) -> Summary | None:
    """Return a summary that was kept; `None` if there is none, or only half of it."""
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.keys() >= SUMMARY_KEYS else None


SUMMARY_KEYS = {"record", "figures", "best", "prompts", "rows"}


def prompt_key(prompt: str) -> str:
    """Return a short name of a prompt, by which its rows are found in other records."""
    return hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _figures(rows: Sequence[RecordedRow]) -> dict[str, Any]:
    scores = [row.outcomes["score"] for row in rows if row.outcomes["score"] is not None]
    return {
        "rows": len(rows),
        "score": _mean(scores),
        "kl": _mean([row.total("kl") or 0.0 for row in rows]),
        "length": _mean([float(row.outcomes["length"]) for row in rows]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(f"{sum(values) / len(values):.4g}") if values else None
