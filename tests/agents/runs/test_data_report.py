"""`textgym data FILE`: what a model reads of a file, before anything is trained."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from textgym import cli
from textgym.agents import DPOConfig, SFTConfig
from textgym.agents.runs.data_report import data_report
from textgym.data.preferences import placed_preferences
from textgym.errors import DataError

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
PAIRS = [{"prompt": f"Film {i} is", "chosen": " a joy.", "rejected": " a bore.", "margin": None} for i in range(4)]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_preferences_are_shown_as_dpo_and_a_reward_model_read_them(tmp_path: Path) -> None:
    report = "\n".join(data_report(written(tmp_path / "pairs.jsonl", PAIRS), examples=1))
    assert "4 rows; values in columns: prompt 4, chosen 4, rejected 4, margin 0" in report
    assert "dpo reads 4 preferences; tokens of a text: 10 to 11, median " in report
    assert "max_length=128 cuts 0 of 8 texts by 0 tokens" in report
    assert "    chosen: ' a joy.<|endoftext|>'" in report
    assert "reward-model reads 4 preferences" in report
    assert "    rejected: 'Film 0 is a bore.<|endoftext|>'" in report
    assert report.count("line 1 of") == 2
    assert "line 2 of" not in report


def test_the_report_and_the_agents_cut_texts_at_the_same_length() -> None:
    reported = inspect.signature(data_report).parameters["max_length"].default
    assert SFTConfig().max_length == DPOConfig().max_length == reported


def test_faults_and_cut_tokens_are_counted_and_nothing_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "completion": " c" * 50}, {"prompt": "a b", "completion": ""}]
    lines = list(data_report(written(tmp_path / "rows.jsonl", rows), reader="sft", max_length=20))
    assert "max_length=20 cuts 1 of 2 texts by " in lines[2]
    warnings = [line for line in lines if line.startswith("  warning: ")]
    assert len(warnings) == 2
    assert "1 of 2 examples lose their end token (first: line 1 of" in warnings[0]
    assert "1 of 2 examples have an empty completion (first: line 2 of" in warnings[1]


def test_the_command_prints_it_and_names_a_row_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["data", written(tmp_path / "rows.jsonl", [{"text": "\x1b[31m red"}]), "--examples", "1"])
    assert "sft reads 1 examples" in (out := capsys.readouterr().out)
    assert "\x1b" not in out, "control characters do not reach the terminal"
    with pytest.raises(SystemExit, match=r"textgym: line 2 of .* has the keys"):
        cli.main(["data", written(tmp_path / "rows.jsonl", [{"text": "a b"}, {"prompt": "a"}])])
    with pytest.raises(DataError, match="nothing can read the first row"):
        list(data_report(written(tmp_path / "rows.jsonl", [{"question": "a"}])))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ultrafeedback", 2),
        ("hh", 2),
        ("hh_strings", 2),
        ("shp", 2),
        ("nectar", 6),
        ("capybara_dpo", 2),
        ("oasst_trees", 3),
        ("oasst_messages", 3),
        ("rewardbench", 2),
    ],
)
def test_public_forms_are_read(name: str, count: int) -> None:
    pairs = [row.pair for row in placed_preferences(EXAMPLES / f"{name}.jsonl")]
    assert len(pairs) == count
    assert not any("Nile" in str(pair["rejected"]) and "Paris" in str(pair["chosen"]) for pair in pairs)
