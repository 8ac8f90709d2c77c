"""Terminals of other encodings, as on Windows: what they cannot show is spelled out, and nothing ends for it."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import gymnasium as gym
import pytest
from rich.console import Console

from textgym import cli
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs import chat as chatting
from textgym.agents.runs.progress import LiveProgress
from textgym.commands.evaluate import typed
from textgym.display import printable, show_all_characters
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

ODD = "→ 中 \N{EN DASH} \N{GRINNING FACE}"
PAGES = ("cp1252", "cp437", "ascii", "cp932")


def stream_of(encoding: str, content: bytes = b"") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors="strict", write_through=True)


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", [*PAGES, "utf-8"])
def test_all_characters_can_be_printed(encoding: str) -> None:
    stream = stream_of(encoding)
    show_all_characters(stream, io.StringIO(), object())
    print(printable(ODD), file=stream)
    Console(file=stream).print(ODD, style="bold")
    lines = written(stream).splitlines()
    spelled = ODD.encode(encoding, "backslashreplace").decode(encoding)
    assert lines == [spelled, spelled]


def test_commands_make_their_output_safe_before_they_say_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    output, errors = stream_of("cp437"), stream_of("cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    folder = tmp_path / ODD
    with pytest.raises(SystemExit) as caught:
        cli.main(["list", str(folder)])
    print(caught.value.code, file=sys.stderr)  # as the interpreter does
    assert "textgym: there are no runs in " in written(errors)
    assert "\\u2192 \\u4e2d \N{EN DASH} \\U0001f600" in written(errors)


@pytest.mark.parametrize("encoding", PAGES)
def test_a_run_in_python_is_shown_on_any_code_page(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = stream_of(encoding)
    monkeypatch.setattr(sys, "stdout", output)
    live = LiveProgress()
    live.say(f"reward: {ODD}")
    live.stage(ODD, 1)
    assert written(output).count("\\U0001f600") == 2


def test_a_terminal_of_another_code_page_shows_the_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    output = stream_of("cp1252")
    output.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setenv("TERM", "xterm")
    live = LiveProgress()
    learn(live)
    assert "KL" in written(output)


def test_without_colours_nothing_is_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR (no-color.org) takes the colours, and a file has no commands for terminals at all."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal, file = io.StringIO(), io.StringIO()
    for console in (Console(file=terminal, force_terminal=True), Console(file=file)):
        learn(LiveProgress(console))
    colours = re.compile(r"\x1b\[(\d+;)*(3[0-8]|4[0-8]|9[0-7]|10[0-7])(;\d+)*m")
    assert "KL" in terminal.getvalue()
    assert not colours.search(terminal.getvalue())
    assert "\x1b" not in file.getvalue()


def learn(live: LiveProgress) -> None:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=["a"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [1.0] * len(completions),
        max_new_tokens=1,
        kl_mode="deferred",
    )
    agent = PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPOConfig(episodes_per_update=2, minibatch_size=2))
    with live:
        live.stage("PPO", 4)
        agent.learn(4, live)


@pytest.mark.parametrize(
    ("encoding", "content", "number"),
    [("utf-8", b"one\ntwo\nthr\xffee\nfour\n", 3), ("cp1252", b"\x81\n", 1), ("ascii", "a\n\nü\n".encode(), 3)],
)
def test_input_that_is_no_text_ends_a_chat_with_a_clear_line(encoding: str, content: bytes, number: int) -> None:
    """Lines before it are answered."""
    lines = typed(stream_of(encoding, content))
    before = [next(lines) for _ in range(number - 1)]
    assert "".join(before).encode(encoding) == b"".join(content.splitlines(True)[: number - 1])
    with pytest.raises(ValueError, match=f"line {number} of the input is not {encoding} text: convert it, or set PY"):
        next(lines)


def test_lines_that_were_read_with_surrogates_are_no_text() -> None:
    with pytest.raises(ValueError, match="line 2 of the input is not UTF-8 text"):
        list(typed(["one", "tw\udcffo"]))


@pytest.mark.slow
def test_a_chat_on_a_code_page_goes_on_after_odd_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    generate, output = chatting.generate, stream_of("cp437")

    def with_odd_text(*arguments: Any, **settings: Any) -> Any:
        samples = generate(*arguments, **settings)
        samples.transcripts[0]["completion"] = ODD
        return samples

    monkeypatch.setattr(chatting, "generate", with_odd_text)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stdin", stream_of("cp437", b"A film\nAnother\n\x80\n"))
    arguments = '{"max_new_tokens": 2, "reward": "textgym.rewards.functions:completion_length"}'
    cli.main(["chat", "--policy", "tiny", "--env-kwargs", arguments])
    assert written(output).count("\\u2192 \\u4e2d \\u2013") == 3
