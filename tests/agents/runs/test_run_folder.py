"""A run's folder: every file is written, whole or not at all, and survives an interrupt."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.run_folder import RunFolder, figures_table
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm


@dataclass
class Settings:
    output_dir: Path = Path("runs/here")
    ppo: PPOConfig = field(default_factory=PPOConfig)


def text_length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def agent() -> PPO:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["one", "two"],
        tokenizer=byte_tokenizer(),
        reward=text_length,
        kl_mode="deferred",
        max_new_tokens=3,
    )
    return PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPOConfig(episodes_per_update=4, minibatch_size=4))


def metrics_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_run_leaves_every_file(tmp_path: Path, agent: PPO) -> None:
    folder = RunFolder(tmp_path / "a" / "run", Settings())
    agent.learn(12, [folder])
    folder.draw_curves()
    folder.write_samples({"before": ["x"]}, ["p"])
    folder.close()
    files = {path.name for path in folder.folder.iterdir()}
    assert files == {"config.json", "metrics.jsonl", "curves.png", "samples.md", "tensorboard", "run.json", "run.lock"}
    config = json.loads((folder.folder / "config.json").read_text())
    assert config["output_dir"] == str(Path("runs/here"))
    assert config["ppo"]["learning_rate"] == PPOConfig().learning_rate
    assert [row["episodes"] for row in metrics_in(folder.folder)] == [4, 8, 12]
    assert is_png(folder.folder / "curves.png")


def test_tensorboard_events_hold_the_metrics(tmp_path: Path, agent: PPO) -> None:
    folder = RunFolder(tmp_path, Settings())
    agent.learn(8, [folder])
    folder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scores = events.Scalars("objective/scores")
    assert [event.step for event in scores] == [4, 8]
    assert [event.value for event in scores] == pytest.approx([row["objective/scores"] for row in metrics_in(tmp_path)])


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_written(tmp_path: Path, agent: PPO) -> None:
    folder = RunFolder(tmp_path, Settings())

    def interrupt(agent: Any, metrics: dict[str, float]) -> None:
        if agent.updates == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        agent.learn(40, [folder, interrupt])
    assert len(metrics_in(tmp_path)) == 2, "each line is on the disk as soon as it is known"
    folder.draw_curves()
    folder.close()
    assert is_png(tmp_path / "curves.png")


def test_a_damaged_line_is_left_out_of_metrics_and_warnings(tmp_path: Path) -> None:
    """A disk that was full, or a process that was killed, leaves half a line; the lines around it are kept."""
    RunFolder(tmp_path, {}).close()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"episodes": 2}\n{"epis\xff\n[4]\n{"episodes": 8}\n{"episodes": 10}\n')
    (tmp_path / "warnings.jsonl").write_bytes(b'{"update": 1}\n{"upd\n\xff\n3\n{"update": 2}\n{"update": 9}\n{"upd')
    with pytest.warns(UserWarning, match="the metrics of 2 of 4 updates"):
        folder = RunFolder(tmp_path, {}, updates=4)
    folder.close()
    assert folder.history == [{"episodes": 2}, {"episodes": 8}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == folder.history
    assert (tmp_path / "warnings.jsonl").read_text() == '{"update": 1}\n{"update": 2}\n'


def test_no_curves_without_metrics(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Settings())
    folder.draw_curves()
    folder.close()
    assert not (tmp_path / "curves.png").exists()


def test_curves_leave_the_plotting_backend_alone(tmp_path: Path, agent: PPO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's inline backend is still there after a run."""
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    folder = RunFolder(tmp_path, Settings())
    agent.learn(4, [folder])
    folder.draw_curves()
    folder.close()
    assert "matplotlib.pyplot" not in sys.modules


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, Settings())
    folder.write("samples.md", "old")
    before = sorted(path.name for path in tmp_path.iterdir())

    def full_disk(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space left"):
            folder.write("samples.md", "new and longer")
    assert (tmp_path / "samples.md").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    folder.write("samples.md", "new")
    assert (tmp_path / "samples.md").read_text() == "new"
    folder.close()


def test_samples_escape_what_would_break_the_table(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Settings())
    folder.write_samples({"before": ["a|b", "é"], "after": ["one\ntwo", "[x]"]}, ["p | q", "r"])
    folder.close()
    assert (tmp_path / "samples.md").read_text(encoding="utf-8").splitlines() == [
        "| prompt | before | after |",
        "| --- | --- | --- |",
        r"| p \| q | a\|b | one two |",
        r"| r | é | \[x\] |",
    ]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunFolder(tmp_path / "file", Settings())


@pytest.mark.parametrize(
    ("module", "pip_line"),
    [("torch.utils.tensorboard", "'textgym[trackers]'"), ("matplotlib.figure", "'textgym[plots]'")],
)
def test_runs_without_the_extras(
    module: str,
    pip_line: str,
    tmp_path: Path,
    agent: PPO,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    folder = RunFolder(tmp_path, Settings())
    agent.learn(4, [folder])
    folder.draw_curves()
    folder.close()
    assert len(metrics_in(tmp_path)) == 1
    assert f"pip install {pip_line}" in " ".join(capsys.readouterr().out.split())


def test_table_of_figures_fits_a_terminal() -> None:
    figures = {
        "before": {"score": 0.0, "kl": -1e-7, "reference_ppl": 1234.5, "ended_by_stop": 0.5},
        "after": {"score": -1.25, "kl": 9.87654, "judge": 0.25},
    }
    output = io.StringIO()
    Console(file=output, width=80).print(figures_table("figures", figures))
    rows = [line.replace("│", " ").split() for line in output.getvalue().splitlines()]
    assert ["before", "after"] in [[cell for cell in row if cell != "┃"] for row in rows]
    for expected in (
        ["score", "0.000", "-1.250"],
        ["kl", "0.000", "9.877"],
        ["reference_ppl", "1234.500"],
        ["judge", "0.250"],
    ):
        assert expected in rows
