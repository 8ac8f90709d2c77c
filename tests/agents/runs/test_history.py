"""Lists and comparisons of runs, finished, stopped, running and half-written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from textgym.agents.runs.claims import RunClaim
from textgym.agents.runs.history import Run, compared, draw_over_each_other, list_of, runs_in
from textgym.errors import RunFolderError
from textgym.saved_flags import expand
from textgym.viewer.page import write_page


def write_run(folder: Path, scores: list[float], agent: str = "ppo", end: str = "") -> Path:
    RunClaim(folder).release()
    (folder / "config.json").write_text(json.dumps({"agent": agent, "env": "textgym/Copy-v0", "model": "tiny"}))
    rows = [{"episodes": 8 * (i + 1), "objective/scores": s, "objective/kl": 0.1} for i, s in enumerate(scores)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def text_of(table: object, width: int = 200) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue()


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    finished = write_run(tmp_path / "a", [0.0, 1.0])
    (finished / "samples.md").write_text("")
    write_run(tmp_path / "deep" / "b", [0.5], agent="[red]grpo", end='{"episodes": 16, "objec')
    running = write_run(tmp_path / "c", [])
    claim = RunClaim(running, resume=True)
    lines = text_of(list_of(tmp_path, 200)).splitlines()
    claim.release()
    assert [line.split()[0] for line in lines[1:]] == [str(tmp_path / name) for name in ("a", "c", "deep/b")]
    assert lines[1].split()[1:] == ["ppo", "textgym/Copy-v0", "tiny", "finished", "2", "1.000", "0.100"]
    assert lines[2].split()[-2:] == ["running", "0"]
    assert lines[3].split()[1:] == ["[red]grpo", "textgym/Copy-v0", "tiny", "stopped", "1", "0.500", "0.100"]


def test_a_narrow_terminal_lists_each_run_in_lines_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/first"), [0.0, 1.0])
    write_run(Path("runs/second"), [])
    lines = text_of(list_of(Path("runs"), 40), 40).splitlines()
    assert [line.rstrip() for line in lines] == [
        "runs/first",
        "  ppo, textgym/Copy-v0, tiny",
        "  stopped, 2 updates",
        "  score 1.000, KL 0.100",
        "runs/second",
        "  ppo, textgym/Copy-v0, tiny",
        "  stopped, 0 updates",
    ]


def test_what_a_run_does_not_say_is_left_out_of_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the demo has no agent and no environment in its settings, and SFT has no KL."""
    monkeypatch.chdir(tmp_path)
    demo, nothing, sft = (write_run(Path("runs") / name, [0.5]) for name in ("demo", "nothing", "sft"))
    (demo / "config.json").write_text(json.dumps({"model": "tiny"}))
    (nothing / "config.json").unlink()
    (sft / "config.json").write_text(json.dumps({"agent": "sft", "env": None, "model": "tiny"}))
    (sft / "metrics.jsonl").write_text(json.dumps({"updates": 1, "objective/scores": 0.25}) + "\n")
    lines = text_of(list_of(Path("runs"), 40), 40).splitlines()
    assert [line.rstrip() for line in lines] == [
        "runs/demo",
        "  tiny",
        "  stopped, 1 updates",
        "  score 0.500, KL 0.100",
        "runs/nothing",
        "  stopped, 1 updates",
        "  score 0.500, KL 0.100",
        "runs/sft",
        "  sft, tiny",
        "  stopped, 1 updates",
        "  score 0.250",
    ]


def test_damaged_lines_of_metrics_are_left_out_and_later_ones_are_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.0, 1.0, 2.0])
    first, second, third = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([first, second[:20], b"null", b'{"a": "\xff', third]))
    assert [row["objective/scores"] for row in Run.read(run).history] == [0.0, 2.0]


OTHERS = {
    "newer": '{"kind": "textgym run", "format": 9, "textgym": "7.1"}',
    "foreign": '{"kind": "someone else"}',
    "damaged": '{"kind": "textg',
}


@pytest.mark.parametrize("name", OTHERS)
def test_runs_of_other_versions_and_programs_are_said_wherever_a_run_is_read(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / name, [0.0])
    (folder / "run.json").write_text(OTHERS[name])
    said = r"format 9, written by textgym 7\.1.*: update textgym" if name == "newer" else "not textgym's or is damaged"
    readers: list[Callable[[], object]] = [
        lambda: Run.read(folder),
        lambda: write_page([folder]),
        lambda: RunClaim(folder, resume=True),
        lambda: RunClaim(folder, overwrite=True),
        lambda: runs_in(tmp_path),
        *(
            (lambda words=words: expand(words))  # type: ignore[misc]
            for words in (
                ["resume", str(folder)],
                ["evaluate", str(folder)],
                ["chat", str(folder)],
                ["train", "--config", str(folder / "config.json")],
            )
        ),
    ]
    for read in readers:
        with pytest.raises(RunFolderError, match=said):
            read()
    assert {path.name for path in folder.iterdir()} == {"run.json", "run.lock", "config.json", "metrics.jsonl"}
    write_run(tmp_path / "ours", [1.0])
    lines = text_of(list_of(tmp_path, 300), 300).splitlines()
    assert lines[1].split()[0] == str(tmp_path / "ours")
    assert lines[2].startswith(f"left out: {folder}")


def test_folders_without_runs_are_said(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there are no runs in"):
        runs_in(tmp_path)
    with pytest.raises(RunFolderError, match=r"is no run folder: it has no run\.json"):
        Run.read(tmp_path)
    with pytest.raises(RunFolderError, match="has no metrics"):
        compared([Run.read(write_run(tmp_path / "a", []))])


@pytest.mark.parametrize(("updates", "last"), [(1, 1), (2, 1), (7, 1), (8, 2), (20, 4)])
def test_the_end_of_a_run_is_its_last_fifth_and_at_least_one_update(updates: int, last: int, tmp_path: Path) -> None:
    run = Run.read(write_run(tmp_path / "run", [9.0] * (updates - last) + [1.0] * last))
    longer = Run.read(write_run(tmp_path / "longer", [9.0] * (updates - last) + [1.0] * (last - 1) + [4.0]))
    row = next(line for line in text_of(compared([run, longer])).splitlines() if line.startswith("│ score"))
    assert "1.000 [1.000, 1.000]" in row
    assert f"{1 + 3 / last:.3f} [" in row


def test_runs_are_compared_at_their_ends(tmp_path: Path) -> None:
    low, high = (
        Run.read(write_run(tmp_path / name, [9.0] * 8 + end))
        for name, end in (("low", [0.0, 0.5]), ("high", [2.0, 2.0]))
    )
    lines = text_of(compared([low, high])).splitlines()
    score = next(line for line in lines if line.startswith("│ score"))
    assert "0.250 [0.000, 0.500]" in score
    assert "2.000 [2.000, 2.000]" in score
    assert not any("loss" in line for line in lines), "what no run reports is left out"
    draw_over_each_other([low, high], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
