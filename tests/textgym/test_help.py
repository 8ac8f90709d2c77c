"""The help of the command: quick, under headings, with defaults, and true to what the command takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import tyro

from textgym import cli, flags

LOADED = """
import json, sys
from textgym.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit:
        pass
print("LOADED", *sorted({"torch", "transformers", "stable_baselines3", "accelerate"} & set(sys.modules)))
"""


def shown_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words])
    return capsys.readouterr().out


def test_help_and_wrong_flags_load_neither_torch_nor_transformers() -> None:
    """They take seconds to load; what was loaded is counted, not the time."""
    helps = [["--help"], *([command, "--help"] for command in flags.COMMANDS)]
    lines = json.dumps([*helps, ["train", "--output-dir", "x", "--learnin-rate", "1"], ["trian"]])
    run = subprocess.run([sys.executable, "-c", LOADED, lines], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize("command", [*flags.COMMANDS, "train --agent dqn", "train --agent sft"])
def test_the_help_lists_the_flags_that_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    shown = shown_by(capsys, *words, "--help")
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(flags._with_settings(words), args=["--help"])
    taken = capsys.readouterr().out
    ours, theirs = (set(re.findall(r"(?:^|[\s│])(--[a-z0-9.-]+[a-z0-9])", text)) for text in (shown, taken))
    assert {flag for flag in theirs if flag != "--help"} <= ours


def test_the_help_has_headings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    lines = " ".join(shown_by(capsys, "train", "--help").split())
    for heading in ("what is trained", "the KL penalty", "the run folder", "PPO", "all policy-gradient agents"):
        assert f" {heading} --" in lines
    assert "--clip-range FLOAT Clip the ratio to [1 - clip_range, 1 + clip_range]. (default: 0.2)" in lines
    assert "--output-dir PATH Where the run folder is written. (required)" in lines


def test_the_help_of_all_commands_names_each(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by(capsys, "--help")
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in flags.COMMANDS)


def test_misspelt_flags_and_commands_are_answered_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--output-dir", "x", "--learnin-rate", "1"])
    assert "--learning-rate" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no command 'trian': did you mean 'train'"):
        cli.main(["trian"])
