"""Records of updates: the prompts, responses and numbers of their tokens, in small files of a run folder.

A record is a JSON object, compressed by gzip, in `records/update-000123.json.gz`. Its columns are lists, and those of
tokens are packed in the file, see `textgym.viewer.packing`.

    format, textgym, agent, update, episodes    what wrote it, and when in the run
    kl_coef, clip                               beta, and the lowest and highest ratio that are not clipped, or null
    num_rows                                    number of rows of the whole update, of which some are recorded
    pieces                                      texts of tokens; columns named `piece` have indices into this list
    prompts                                     texts of prompts
    rows                                        a number a row: `prompt` (an index), `length`, `score` (null if the row
                                                is unscored), `stopped` (false at the length limit), `reward/<name>`,
                                                and `judge` if somebody besides the rewards scores the rows
    judges                                      names of the columns of `rows` that the policy is not trained on
    texts                                       text of each row whose text is not that of its pieces, by row
    tokens                                      a number a response token, row after row: `piece`, `reward`, and `mine`
                                                (0 for tokens of the environment) if the environment inserted some
    numbers                                     a number a token that the policy generated: `log_prob`, `kl`, `value`,
                                                `advantage`, `entropy`, ..., null if it is not finite
    each, alternatives                          of `policy` and `reference`: `piece` and `percent`, the probability, of
                                                the `each` most likely tokens in place of each generated token
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from textgym.data.files import atomic_file
from textgym.errors import DamagedFolderError
from textgym.viewer.packing import (
    pack,
    pack_alternatives,
    pack_numbers,
    unpack,
    unpack_alternatives,
    unpack_numbers,
)

FORMAT = 1
"""Version of the format; a reader refuses newer ones."""
FOLDER = "records"
PATTERN = f"{FOLDER}/update-*.json.gz"
NAME = re.compile(r"update-(\d+)\.json\.gz")

Record = dict[str, Any]


def record_path(run: Path, update: int) -> Path:
    """Return the file of an update's record in a run folder."""
    return run / FOLDER / f"update-{update:06d}.json.gz"


def update_of(path: Path) -> int:
    """Return the number of the update that a file is the record of."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def write_record(run: Path, record: Record) -> Path:
    """Write a record into a run folder, whole or not at all; the same record is always the same bytes."""
    path = record_path(run, record["update"])
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {
        **record,
        "tokens": {
            name: pack_numbers(column) if name == "reward" else pack(column)
            for name, column in record["tokens"].items()
        },
        "numbers": {name: pack_numbers(column) for name, column in record["numbers"].items()},
        "alternatives": pack_alternatives(record["alternatives"], record["each"]),
    }
    text = json.dumps(packed, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode("utf-8", "replace"), mtime=0))  # lone surrogates become "?"
    return path


def read_record(path: Path, alternatives: bool = True) -> Record:
    """Return a record.

    Args:
        path: The file.
        alternatives: Whether to unpack the most likely tokens too, which are most of a record.

    Raises:
        DamagedFolderError: If the file is incomplete or no record, or a newer version of textgym wrote it.
    """
    try:
        record = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DamagedFolderError(f"{path} is incomplete or no record: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise DamagedFolderError(f"{path} is no record: it does not say its format")
    if record["format"] > FORMAT:
        raise NewerRecordError(
            f"{path} has format {record['format']}, written by textgym {record.get('textgym')}; this version reads "
            f"format {FORMAT}: update textgym"
        )
    try:
        return _unpacked(record, alternatives)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DamagedFolderError(f"{path} is no whole record: {type(error).__name__} {error}") from error


def _unpacked(record: Record, alternatives: bool) -> Record:
    packed = record["alternatives"]
    return {
        **record,
        "tokens": {
            name: unpack_numbers(column) if name == "reward" else unpack(column)
            for name, column in record["tokens"].items()
        },
        "numbers": {name: unpack_numbers(column) for name, column in record["numbers"].items()},
        "alternatives": unpack_alternatives(packed, record["each"]) if alternatives else packed,
    }


class NewerRecordError(DamagedFolderError):
    """A newer version of textgym wrote a record."""


def records_of(run: Path) -> list[Path]:
    """Return the records of a run folder, oldest update first; other files, such as copies of records, are none."""
    return sorted((path for path in run.glob(PATTERN) if NAME.fullmatch(path.name)), key=update_of)


def rounded(values: Iterable[float], digits: int = 5) -> list[float | int | None]:
    """Return numbers with so many significant digits; `None` for those that are not finite."""
    return [_short(float(f"{value:.{digits}g}")) if math.isfinite(value) else None for value in values]


def _short(value: float) -> float | int:
    """Return whole numbers as integers, whose text is shorter."""
    return int(value) if value.is_integer() else value
