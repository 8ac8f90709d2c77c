"""Records: what is written is read, damage and newer versions are told apart, and lone surrogates do no harm."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from textgym.errors import DamagedFolderError
from textgym.viewer.records import (
    FORMAT,
    NewerRecordError,
    Record,
    read_record,
    record_path,
    records_of,
    rounded,
    write_record,
)


def record(update: int = 3, **changes: object) -> Record:
    tokens = {"piece": [0, 1, 0], "reward": [0.0, 0.0, 1.25]}
    whole: Record = {
        "format": FORMAT,
        "textgym": "0.2.0",
        "agent": "PPO",
        "update": update,
        "episodes": 8 * update,
        "kl_coef": 0.05,
        "clip": [0.8, 1.2],
        "num_rows": 8,
        "pieces": [" good", "</script>\u2028"],
        "prompts": ["A \x00 film\x1b[31m"],
        "rows": {"prompt": [0], "length": [3], "score": [1.25], "stopped": [True]},
        "texts": {},
        "tokens": tokens,
        "numbers": {"log_prob": [-1.25, -0.5, None]},
        "each": 2,
        "alternatives": {"policy": {"piece": [0, 1, 1, 0, 0, 1], "percent": [60, 40, 90, 9, 51, 49]}},
    }
    return {**whole, **changes}


def test_a_record_comes_back(tmp_path: Path) -> None:
    write_record(tmp_path, record())
    assert read_record(record_path(tmp_path, 3)) == record()


def test_the_same_record_is_the_same_bytes(tmp_path: Path) -> None:
    first = write_record(tmp_path, record()).read_bytes()
    assert write_record(tmp_path, record()).read_bytes() == first


def test_records_are_listed_by_update(tmp_path: Path) -> None:
    for update in (1_000_000, 20, 3):
        write_record(tmp_path, record(update))
    (tmp_path / "records" / "notes.txt").write_text("mine")
    assert [read_record(path)["update"] for path in records_of(tmp_path)] == [3, 20, 1_000_000]


def test_lone_surrogates_become_question_marks(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(prompts=["a\ud800b"]))
    assert read_record(path)["prompts"] == ["a?b"]


@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_record_that_was_cut_is_damaged(tmp_path: Path, keep: int) -> None:
    path = write_record(tmp_path, record())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFolderError, match=r"update-000003.json.gz is incomplete"):
        read_record(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "one"}', "nonsense", '{"format": 1}'])
def test_what_is_no_record_is_damaged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "update-000001.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DamagedFolderError):
        read_record(path)


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "update-000001.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"format": FORMAT + 1, "textgym": "9.1"}).encode()))
    with pytest.raises(NewerRecordError, match=r"written by textgym 9\.1.*update textgym"):
        read_record(path)


def test_numbers_are_rounded_and_those_that_are_not_finite_are_missing() -> None:
    assert rounded([1.23456789, 2.0, float("nan"), float("-inf")], digits=3) == [1.23, 2, None, None]
