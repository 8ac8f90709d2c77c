"""The original data sets: small files with the columns of their cards, read by the `datasets` package."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym.data.corpora import hub
from textgym.data.prompts import load_prompts
from textgym.errors import ConfigError

RECORDS: dict[str, list[dict[str, Any]]] = {
    "COMMON_GEN": [
        {"concept_set_idx": 0, "concepts": ["dog", "run"], "target": "The dog can run."},
        {"concept_set_idx": 0, "concepts": ["dog", "run"], "target": "Dogs run."},
        {"concept_set_idx": 1, "concepts": ["sun"], "target": ""},
    ],
    "CNN_DAILYMAIL": [{"article": "A long story.", "highlights": "A story.", "id": "1"}],
    "TOTTO": [
        {"linearized_input": "<page_title> A", "target": "A is it.", "references": [], "table_page_title": "A"},
        {"linearized_input": "<page_title> B", "target": "", "references": ["B is.", "B."], "table_page_title": "B"},
    ],
    "IWSLT": [{"translation": {"en": "Thank you.", "de": "Danke."}}],
    "NARRATIVE_QA": [
        {
            "document": {"id": "1", "summary": {"text": "Ada wrote."}},
            "question": {"text": "Who?"},
            "answers": [{"text": "Ada"}, {"text": "Ada did"}],
        }
    ],
    "DAILY_DIALOG": [{"utterances": ["Hi .", " Hello .", "Bye .", "So long ."], "acts": [1, 1, 1, 1]}],
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "COMMON_GEN": [
        {"prompt": "dog, run =", "concepts": ["dog", "run"], "references": ["The dog can run.", "Dogs run."]},
        {"prompt": "sun =", "concepts": ["sun"], "references": []},
    ],
    "CNN_DAILYMAIL": [{"prompt": "A long story. In short:", "references": "A story."}],
    "TOTTO": [
        {"prompt": "<page_title> A | Text:", "references": ["A is it."], "concepts": ["A"]},
        {"prompt": "<page_title> B | Text:", "references": ["B is.", "B."], "concepts": ["B"]},
    ],
    "IWSLT": [{"prompt": "English: Thank you. German:", "references": ["Danke."]}],
    "NARRATIVE_QA": [
        {"prompt": "Ada wrote. Question: Who? Answer:", "answer": "Ada", "references": ["Ada", "Ada did"]}
    ],
    "DAILY_DIALOG": [
        {"prompt": "A: Hi .\nB: Hello .\nA:", "references": "Bye ."},
        {"prompt": "A: Hello .\nB: Bye .\nA:", "references": "So long ."},
    ],
}


@pytest.mark.parametrize("name", RECORDS)
def test_columns_are_mapped(name: str) -> None:
    rows = getattr(hub, name).rows(RECORDS[name])
    assert rows == ROWS[name]
    assert load_prompts(rows) == rows


@pytest.mark.parametrize("name", RECORDS)
def test_loaded_by_the_datasets_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    original = getattr(hub, name)
    for split in ("train", "test", "challenge_test_scramble"):
        records = pyarrow.Table.from_pylist(RECORDS[name] if split == "test" else RECORDS[name][-1:])
        if original.converted is not None:  # the layout of the hub's conversions: config/split/0000.parquet
            folder = tmp_path / "data" / original.converted.replace("*", "default") / split
            folder.mkdir(parents=True)
            parquet.write_table(records, folder / "0000.parquet")
        elif split != "challenge_test_scramble":  # that of the data sets that are files themselves
            (tmp_path / "data").mkdir(exist_ok=True)
            parquet.write_table(records, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    local = replace(original, path=str(tmp_path / "data"), config=None)
    assert local.load("test") == ROWS[name]
    with pytest.raises(ValueError, match="no split 'dev'"):
        local.load("dev")


def test_data_sets_that_are_scripts_are_read_from_their_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, *arguments: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((path, *arguments, kwargs))
        return []

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub.CNN_DAILYMAIL.load("test")
    hub.DAILY_DIALOG.load("test")
    hub.CNN_DAILYMAIL.load("test", "0" * 40)
    hub.DAILY_DIALOG.load("test", "1" * 40)
    assert asked == [
        ("abisee/cnn_dailymail", "3.0.0", {"split": "test"}),
        (
            "roskoN/dailydialog",
            {"data_files": {"test": "full/test/*.parquet"}, "split": "test", "revision": "refs/convert/parquet"},
        ),
        ("abisee/cnn_dailymail", "3.0.0", {"split": "test", "revision": "0" * 40}),
        (
            "roskoN/dailydialog",
            {"data_files": {"test": "full/test/*.parquet"}, "split": "test", "revision": "1" * 40},
        ),
    ]


def test_a_task_takes_its_original(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(self: hub.Original, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((self.path, split, revision))
        return self.rows(RECORDS["IWSLT"])

    monkeypatch.setattr(hub.Original, "load", load)
    env = gym.make("textgym/Translate-v0", original=True, split="validation", revision="0" * 40)
    assert asked == [("IWSLT/iwslt2017", "validation", "0" * 40)]
    assert env.unwrapped.task.rows == ROWS["IWSLT"]


def test_a_revision_without_the_original_is_refused() -> None:
    with pytest.raises(ConfigError, match="revision='main' is of original=True"):
        gym.make("textgym/Translate-v0", revision="main")
