"""Text of models and data is shown as it is, and commands no terminal, page or table."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from textgym.agents.runs.demo import samples_table
from textgym.agents.runs.run_folder import figures_table
from textgym.display import html_text, markdown_cell, printable, rich_text
from textgym.envs.text import TextEnv
from textgym.errors import TextgymError
from textgym.rewards.engine.calling import Log
from textgym.rewards.engine.completions_to_score import Finished, RewardError
from textgym.rewards.engine.scoring import Scorer
from textgym.testing import byte_tokenizer

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r[red]x[/red] | `a` <img src=x onerror=alert(1)> ![y](http://z) \ud800"


def shown(*things: Any) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=True)
    console.print(*things)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub("\x1b\\[[0-9;]*m", "", text)  # rich's own styles


@given(st.text(st.characters()))
def test_nothing_printable_has_a_control_character(text: str) -> None:
    for char in printable(text):
        assert char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(char) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    printable(text).encode()  # lone surrogates could not be printed


def test_what_commands_nothing_stays() -> None:
    text = "naïve \t日本語\n\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e [bold] | <b>"
    assert printable(text) == text


def no_reward(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize("mode", ["ansi", "html", "human"])
def test_renders_command_nothing(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    evil = EVIL.removesuffix("\ud800")  # no token has a lone surrogate
    tokens = byte_tokenizer().encode(evil)
    env = TextEnv([evil], byte_tokenizer(), [no_reward], max_new_tokens=len(tokens) + 1, render_mode=mode)
    env.reset(seed=0)
    for token in tokens:
        env.step(token)

    text = env.render() or capsys.readouterr().out
    text = text.replace("\x1b[1m", "").replace("\x1b[0m", "")  # its own
    assert not set("\x1b\x07\r\u202e\ud800") & set(text)
    assert "[red]x[/red]" in text
    if mode == "html":
        assert "<img" not in text


def test_tables_show_markup_as_it_is() -> None:
    table = figures_table("[red]title[/red]", {"[b]policy": {"reward/[i]": 1.0, "own": "[u]0.5"}})
    text = shown(table, samples_table([EVIL], [EVIL], ["[/]"]))
    for part in ("[red]title[/red]", "[b]policy", "reward/[i]", "[u]0.5", "[/]", r"\x1b]0;owned\x07"):
        assert part in text
    assert not set("\x1b\x07\r\u202e\ud800") & set(text)


def test_a_cell_of_markdown_is_one_cell_of_plain_text() -> None:
    cell = markdown_cell(EVIL)
    assert "\n" not in cell
    for command in ("|", "`", "<", "[", "!"):
        assert not re.search(rf"(?<!\\){re.escape(command)}", cell), command
    assert "http://" not in cell


def test_html_and_rich_text_are_plain() -> None:
    assert html_text("<b>&\x00") == "&lt;b&gt;&amp;\\x00"
    assert rich_text("[red]a\x1b[0m").plain == "[red]a\\x1b[0m"


def test_an_error_of_the_command_line_is_printed_without_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textgym import cli

    def fails(command: Any) -> None:
        raise TextgymError(f"not this: {EVIL}")

    monkeypatch.setattr(cli, "run", fails)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", "--output-dir", str(tmp_path / "run")])
    assert r"not this: \x1b]0;owned\x07\x1b[2J\u202egnp.exe" in str(raised.value.code)


def test_a_report_of_data_is_printed_without_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from textgym import cli

    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [{"prompt": f"{number}\x1b[2J", "completion": f"{number} \u202etxt"} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.main(["data", str(tmp_path / "rows.jsonl")])
    said = capsys.readouterr().out
    assert "[2J" in said
    assert not set("\x1b\u202e") & set(said)


def test_an_error_of_a_reward_is_without_commands_and_short() -> None:
    def judge(completions: list[str]) -> list[float]:
        raise ValueError(f"cannot read {completions[0]}")

    long = Finished(["p" * 10**6], [EVIL], [[1]], [[2]], {})
    with pytest.raises(RewardError) as raised:
        Scorer(judge)(long)
    said = str(raised.value)
    assert r"raised ValueError: cannot read \x1b]0;owned\x07" in said
    assert not set("\x1b\x07\r\u202e\ud800") & set(said)
    assert len(said) < 5000


@pytest.mark.parametrize("name", ["completions", "completion", "completion_ids", "prompts", "log_metric", "text_ids"])
def test_a_column_whose_name_is_taken_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b", name: "c"}) + "\n")
    with pytest.raises(ValueError, match=rf"line 2 of .*prompts.jsonl' has a column '{name}'.*rename the column"):
        gym.make("textgym:textgym/Text-v0", prompts=str(file), tokenizer="tiny", reward=len)
    with pytest.raises(RewardError, match="which is taken"):
        Log("judge", 1).extra("completion", ["a"])
