"""LiveProgress: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
from typing import Any

import gymnasium as gym
import pytest
from rich.console import Console

from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.agents.runs.progress import LiveProgress
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm


def make_agent() -> PPO:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["one", "two"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        kl_mode="deferred",
        max_new_tokens=4,
    )
    return PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPOConfig(episodes_per_update=4, minibatch_size=4))


def shown(agent: Any, episodes: int, quiet: bool = False, **console: Any) -> str:
    output = io.StringIO()
    live = LiveProgress(Console(file=output, color_system=None, **console), quiet)
    with live:
        live.stage("PPO", episodes)
        agent.learn(episodes, [live])
        live.finish()
    return output.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_shows_a_table_that_fits(width: int) -> None:
    frames = shown(make_agent(), 12, force_terminal=True, width=width).split("PPO")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frames[-2]).splitlines()
    header = next(line for line in lines if "update" in line)
    assert header.split()[:3] == ["update", "episodes", "score"]
    assert ("tokens/s" in header) == (width == 200)
    assert all(len(line) <= width and "…" not in line for line in lines)
    assert [line.split()[0] for line in lines if re.match(r" +\d", line)][-3:] == ["1", "2", "3"]


def test_elsewhere_every_update_is_a_plain_line() -> None:
    lines = shown(make_agent(), 12, width=300).splitlines()
    assert lines[0] == "PPO"
    assert len(lines) == 4
    assert all(line.isascii() for line in lines)
    for update, line in enumerate(lines[1:], start=1):
        assert line.startswith(f"update {update}  episodes {4 * update}  score +")
        assert {"KL", "tokens", "entropy", "episodes/s", "tokens/s"} <= set(line.split())
    assert "left" not in lines[1], "the first update warms up"
    assert lines[-1].endswith("left 0:00")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines_at_once(term: str) -> None:
    lines = shown(make_agent(), 8, force_terminal=True, width=300, _environ={"TERM": term}).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["PPO", "update 1", "update 2"]


def test_what_is_said_reaches_a_terminal_as_it_is() -> None:
    output = io.StringIO()
    LiveProgress(Console(file=output, force_terminal=True, color_system="standard")).say(
        "score 3.5 of [bold]one[/bold]"
    )
    assert output.getvalue() == "score 3.5 of [bold]one[/bold]\n"


def test_a_stage_that_is_over_shows_how_long_it_took() -> None:
    output, now = io.StringIO(), [0.0]
    live = LiveProgress(Console(file=output, width=200))
    live.progress.get_time = lambda: now[0]
    live.stage("PPO", 4)
    now[0] = 75.0
    live.finish()
    live.console.print(live.progress)
    assert "01:15" in output.getvalue().split()


def test_quiet_is_quiet() -> None:
    assert shown(make_agent(), 4, quiet=True, width=300) == ""
    assert shown(make_agent(), 4, quiet=True, width=80, force_terminal=True) == ""


def test_agents_without_episodes_show_their_updates() -> None:
    rows = [{"prompt": "a", "completion": letter} for letter in "bcde"]
    config = SFTConfig(batch_size=2, max_steps=2)
    agent = SFT(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), config)
    output = io.StringIO()
    live = LiveProgress(Console(file=output, width=200))
    live.stage("SFT", 2)
    agent.learn([live])
    assert [line.split("  ")[0] for line in output.getvalue().splitlines()] == ["SFT", "update 1", "update 2"]
    assert "loss" in output.getvalue()


def test_episodes_a_second_are_those_of_the_update() -> None:
    live, agent = LiveProgress(quiet=True), make_agent()
    live.stage("PPO")
    history: list[dict[str, float]] = []
    agent.learn(7, [lambda _, metrics: history.append(metrics), live])
    for metrics, row, size in zip(history, live.recent, (4, 3), strict=True):
        seconds = metrics["time/rollout_s"] + metrics["time/update_s"]
        assert row["episodes/s"] == f"{size / seconds:,.1f}"
