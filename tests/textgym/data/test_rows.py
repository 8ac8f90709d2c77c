"""Rows of files: encodings, and errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textgym.data.completions import load_examples
from textgym.data.preferences import load_preferences
from textgym.data.prompts import load_prompts

ROWS = [{"prompt": "It is", "completion": " good."}, {"prompt": "Café is", "completion": " gut über."}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_and_without_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(TEXT.encode(encoding))
    assert load_examples(tmp_path / "rows.jsonl") == [(row["prompt"], row["completion"]) for row in ROWS]
    (tmp_path / "prompts.txt").write_bytes("Café is\n".encode(encoding))
    assert [row["prompt"] for row in load_prompts(tmp_path / "prompts.txt")] == ["Café is"]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", r"line 1 of '.*rows.jsonl' is not UTF-8 .*: convert the file"),
        ("utf-16-le", r"line 1 of '.*rows.jsonl' is not JSON"),
        ("latin-1", r"line 2 of '.*rows.jsonl' is not UTF-8 .*: convert the file"),
    ],
)
@pytest.mark.parametrize("load", [load_examples, load_preferences, load_prompts])
def test_other_encodings_are_refused_with_file_and_line(load: Any, encoding: str, message: str, tmp_path: Path) -> None:
    rows = [{**row, "chosen": "a", "rejected": "b"} for row in ROWS]
    if load is load_prompts:  # whose rows have no completion of their own
        rows = [{name: value for name, value in row.items() if name != "completion"} for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("load", "row", "column"),
    [
        (load_examples, {"prompt": "a", "completion": "\ud83d"}, "completion"),
        (load_examples, {"text": "\ud83d"}, "text"),
        (load_examples, {"prompt": [{"role": "user", "content": "\ud83d"}], "completion": "a"}, "prompt"),
        (load_preferences, {"prompt": "\ud83d", "chosen": "a", "rejected": "b"}, "prompt"),
        (load_preferences, {"chosen": "a b", "rejected": "a \ud83d"}, "rejected"),
    ],
)
def test_half_a_character_is_refused_with_file_line_and_column(
    load: Any, row: dict[str, Any], column: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"'{column}' of line 2 of '.*rows.jsonl': .*has the lone surrogate"):
        load(tmp_path / "rows.jsonl")


def test_long_values_are_shown_in_part() -> None:
    with pytest.raises(ValueError, match=r"'chosen' of row 0") as caught:
        load_preferences([{"chosen": ["x" * 10_000], "rejected": "b"}])
    assert len(str(caught.value)) < 500
