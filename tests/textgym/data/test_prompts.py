from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from textgym.data import prompts as prompts_module
from textgym.data.corpora.sources import Snippet
from textgym.data.importing import import_attribute
from textgym.data.prompts import load_prompts, policy_snippets, snippet_prompts

ROWS = [{"prompt": "One", "answer": 1}, {"prompt": "Two", "answer": 2}]


class Dataset:
    """The part of `datasets.Dataset` that counts here."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0]) if rows else []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class DatasetDict(dict[str, Dataset]):
    @property
    def column_names(self) -> dict[str, list[str]]:
        return {name: split.column_names for name, split in self.items()}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable module that offers prompts."""
    code = [
        f"ROWS = {ROWS!r}",
        "def make(): return ROWS",
        "class Split: rows = ['a']",
        "TEXT = 'openings'",
        "NUMBER = 3",
        "EMPTY = []",
        "BAD = ['a', '']",
    ]
    (tmp_path / "prompts_of_a_user.py").write_text("\n".join(code))
    (tmp_path / "broken_of_a_user.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    yield "prompts_of_a_user"
    sys.modules.pop("prompts_of_a_user", None)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_strings() -> None:
    assert load_prompts(["One", "Two"]) == [{"prompt": "One"}, {"prompt": "Two"}]


def test_dicts_keep_their_columns_and_are_copied() -> None:
    rows = load_prompts(ROWS)
    assert rows == ROWS
    rows[0]["answer"] = 7
    assert ROWS[0]["answer"] == 1


def test_a_column_that_a_row_lacks_is_none() -> None:
    assert load_prompts([{"prompt": "One", "answer": 1}, "Two"]) == [
        {"prompt": "One", "answer": 1},
        {"prompt": "Two", "answer": None},
    ]


def test_dataset() -> None:
    assert load_prompts(Dataset(ROWS)) == ROWS


@pytest.mark.parametrize("kind", [str, Path])
def test_jsonl(tmp_path: Path, kind: type) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(ROWS[0]), "", json.dumps(ROWS[1]))
    assert load_prompts(kind(path)) == ROWS


@pytest.mark.parametrize("kind", [str, Path])
def test_txt_keeps_spaces_and_skips_empty_lines(tmp_path: Path, kind: type) -> None:
    path = write(tmp_path / "p.txt", "Once upon ", "", "  caf\u00e9")
    assert load_prompts(kind(path)) == [{"prompt": "Once upon "}, {"prompt": "  caf\u00e9"}]


@pytest.mark.parametrize("attribute", ["ROWS", "make"])
def test_module_attribute(module: str, attribute: str) -> None:
    assert load_prompts(f"{module}:{attribute}") == ROWS


def test_dotted_attribute(module: str) -> None:
    assert load_prompts(f"{module}:Split.rows") == [{"prompt": "a"}]


def test_openings() -> None:
    openings = [row["prompt"] for row in load_prompts("openings")]
    assert len(openings) == 200
    assert len({opening.lower() for opening in openings}) == 200
    for opening in openings:
        assert opening.isascii()
        assert opening == opening.strip()
        assert opening[0].isupper()
        assert opening[-1].isalpha()
        assert 3 <= len(opening.split()) <= 9


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts in a list: give at least one"),
        (Dataset([]), "no prompts in a Dataset"),
        ([{"prompt": "a"}, {"text": "b"}], r"row 1 of the prompts has no 'prompt', only \['text'\]: rename"),
        (["a", "b", ""], "the prompt of row 2 of the prompts is '': give it some text"),
        (["a", " \n"], "the prompt of row 1 of the prompts is"),
        ([{"prompt": 3}], "the prompt of row 0 of the prompts is 3"),
        ([{"prompt": None}], "the prompt of row 0 of the prompts is None"),
        (["a", 3], "row 1 of the prompts is 3: a row is a string or a dict"),
        ([["a"]], r"row 0 of the prompts is \['a'\]"),
        (None, "cannot read prompts from a NoneType: prompts are a list"),
        ({"prompt": "a"}, "cannot read prompts from a dict"),
        (DatasetDict(train=Dataset(ROWS)), "cannot read prompts from a DatasetDict: .*one split"),
        (Path("prompts.csv"), r"cannot read prompts from 'prompts\.csv': .*\.jsonl or \.txt"),
        ("Once upon a time", "cannot read prompts from 'Once upon a time': .*To use a single string, put it in a list"),
        ("", "cannot read prompts from ''"),
        ("nowhere/p.jsonl", r"there is no file 'nowhere/p\.jsonl' with prompts; the working folder is"),
        (Path("nowhere/p.txt"), "there is no file"),
        ("module_nobody_has:ROWS", "there is no module 'module_nobody_has'. Install it"),
    ],
)
def test_what_is_wrong_is_named(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(prompts)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"prompt": "a"}', '{"prompt": "b"'],
            r"line 2 of '.*p\.jsonl' is not JSON \(.*\): write one JSON object per line",
        ),
        (['{"prompt": "a"}', "", '{"text": "b"}'], "line 3 of .* has no 'prompt'"),
        (['{"prompt": ""}'], "the prompt of line 1 of"),
        (["[1]"], "line 1 of .* is .*: a row is a string or a dict"),
        ([""], "no prompts in '.*p.jsonl'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / "p.jsonl", *lines))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("NOTHING", "'prompts_of_a_user' has no 'NOTHING'. It has: .*ROWS"),
        ("TEXT", "'prompts_of_a_user:TEXT' is the string 'openings'"),
        ("NUMBER", "cannot read prompts from a int"),
        ("EMPTY", "no prompts in 'prompts_of_a_user:EMPTY'"),
        ("BAD", r"row 1 of the prompts \('prompts_of_a_user:BAD'\) is ''"),
    ],
)
def test_what_is_wrong_in_a_module_is_named(module: str, attribute: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(f"{module}:{attribute}")


@pytest.mark.parametrize("name", ["no_colon", "module:", ":attribute", ""])
def test_import_attribute_wants_both_parts(name: str) -> None:
    with pytest.raises(ValueError, match="write 'module:attribute'"):
        import_attribute(name)


@pytest.mark.parametrize("attribute", ["ROWS now", "ROWS\n", "ROWS,", "a:b", " ROWS"])
def test_what_is_no_name_imports_no_module(attribute: str, module: str) -> None:
    """Checks of names in files look for `module:attribute`, so nothing else may load a module."""
    sys.modules.pop(module, None)
    with pytest.raises(ValueError, match="write 'module:attribute'"):
        import_attribute(f"{module}:{attribute}")
    assert module not in sys.modules


@pytest.mark.usefixtures("module")
def test_import_attribute_tells_a_missing_module_from_a_broken_one() -> None:
    with pytest.raises(ValueError, match=r"there is no module 'json\.nothing'"):
        import_attribute("json.nothing:x")
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        import_attribute("broken_of_a_user:x")


def test_snippet_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = [Snippet(f"one two {i} four five six", float(i)) for i in range(200)] + [Snippet("a b c d e", 1.0)]
    monkeypatch.setattr(prompts_module, "movie_snippets", lambda: snippets)
    rows = [row for split in ("train", "policy", "test") for row in snippet_prompts(split)]
    assert sorted(row["rating"] for row in rows) == [float(i) for i in range(200)]
    assert {row["prompt"] for row in rows} == {f"one two {i}" for i in range(200)}
    assert all(row["text"] == f"{row['prompt']} four five six" for row in rows)
    assert load_prompts("textgym.data.prompts:policy_snippets") == policy_snippets() == snippet_prompts("policy")


def test_snippets_that_begin_alike_are_no_test_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = [Snippet(f"One, two three {i} five six", float(i)) for i in range(200)]
    monkeypatch.setattr(prompts_module, "movie_snippets", lambda: snippets)
    assert snippet_prompts("train")
    assert snippet_prompts("test") == []


def test_snippet_prompts_of_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="no split 'dev': use 'train', 'policy' or 'test'"):
        snippet_prompts("dev")


@pytest.mark.data
def test_real_snippets() -> None:
    rows = snippet_prompts("policy")
    assert 1000 < len(rows) < 2000
    assert all(-4 <= row["rating"] <= 4 for row in rows)
    assert all(row["text"].startswith(row["prompt"][:3]) for row in rows)
    assert load_prompts(rows) == rows


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "one"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl' is not UTF-8"):
        load_prompts(tmp_path / "rows.jsonl")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgym.data.rows.LONGEST_LINE", 100)
    (tmp_path / "rows.txt").write_text("short\n" + "x" * 101 + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*rows.txt' has more than 100 bytes"):
        load_prompts(tmp_path / "rows.txt")
    (tmp_path / "rows.txt").write_text("short\n" + "x" * 99 + "\n")
    assert len(load_prompts(tmp_path / "rows.txt")) == 2
