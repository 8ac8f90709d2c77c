"""The first line of a command that takes long comes before anything that takes time."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from textgym.__main__ import main
from textgym.announce import announce

LINE = "textgym: loading torch and transformers\n"


def test_the_first_line_is_printed_before_the_command_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is a fake here, which looks at what was printed before it began."""
    seen: list[str] = []
    command = types.ModuleType("textgym.cli")
    command.main = lambda: seen.append(capsys.readouterr().err)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "textgym.cli", command)
    monkeypatch.setattr(sys, "argv", ["textgym", "train", "--output-dir", "run"])
    main()
    assert seen == [LINE]


def test_nothing_that_takes_time_is_loaded_for_the_first_line() -> None:
    slow = ("torch", "transformers", "tyro", "yaml", "rich", "textgym.cli", "textgym.flags", "textgym.agents")
    code = f"import sys, textgym.__main__; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("train --output-dir run", True),
        ("resume run", True),
        ("demo", True),
        ("reward-model --output-dir run", True),
        ("train --output-dir run --quiet", False),
        ("train --help", False),
        ("resume -h", False),
        ("evaluate run", False),
        ("list", False),
        ("", False),
    ],
)
def test_only_long_commands_are_announced(words: str, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    announce(words.split())
    assert capsys.readouterr() == ("", LINE if shown else "")
