"""The folder of a run: config, metrics, TensorBoard events, curves, samples."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from textgym.data.files import atomic_file, read_json_lines, remove_leftovers
from textgym.display import markdown_cell, rich_text
from textgym.errors import DamagedFolderError
from textgym.settings import idle_options

from ..common.rollout_agent import Metrics
from .claims import EVENTS, RunClaim
from .progress import Agent, clock

CURVES = {
    "score": "objective/scores",
    "held-out score": "eval/score",
    "KL to the reference (nats a sequence)": "objective/kl",
    "response tokens": "val/response_tokens",
    "entropy (nats a token)": "policy/entropy_avg",
    "approximate KL of an update": "policy/approxkl_avg",
    "explained variance of the critic": "val/explained_variance",
    "explained variance within prompts": "val/explained_variance_within_prompts",
    "loss": "loss",
    "entropy": "entropy",
    "margin of the implicit rewards": "rewards/margins",
    "share of pairs ranked right": "rewards/accuracies",
    "log-prob of the chosen": "logps/chosen",
    "log-prob of the rejected": "logps/rejected",
    "learning rate": "learning_rate",
}
"""Titles and metrics of the curves; metrics that the agent does not report are left out."""

WARNINGS = "warnings.jsonl"


class RunFolder:
    """Callback of agents that writes config, metrics, TensorBoard events, curves and samples into a folder.

    Args:
        folder: The folder; it is created if it does not exist.
        config: Settings of the run, a dataclass or a mapping, which are saved as `config.json` immediately.
        updates: Number of updates of the run that is resumed. Their metrics are kept and later ones are removed.
        claim: Claim of the folder, if there is one already; it is released by `close`.

    Raises:
        RunFolderError: If the folder has other files, or holds a run and `updates` is 0.
        OSError: If the folder cannot be written.
    """

    def __init__(self, folder: str | Path, config: Any, updates: int = 0, claim: RunClaim | None = None) -> None:
        self.folder = Path(folder)
        self.claim = claim or RunClaim(self.folder, resume=updates > 0)
        remove_leftovers(self.folder)
        self.write_json("config.json", dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config))
        path, events = self.folder / "metrics.jsonl", self.folder / "tensorboard"
        self.history = _read_metrics(path, updates) if updates else []
        self.write(path.name, "".join(json.dumps(row) + "\n" for row in self.history))
        self.metrics = path.open("a")
        self._keep_warnings(updates)
        if not updates:
            for file in self.folder.glob(EVENTS):  # of updates that a checkpoint did not keep
                file.unlink()
        self.events = _summary_writer(events, self.history[-1] if self.history else None)

    def __call__(self, agent: Agent, metrics: Metrics) -> None:
        """Append the metrics of an update."""
        self.history.append(metrics)
        self.metrics.write(json.dumps(metrics) + "\n")
        self.metrics.flush()
        for name, value in metrics.items():
            self.events.add_scalar(name, value, int(metrics[clock(metrics)]))
        self.events.flush()

    def keep_warning(self, update: int, text: str) -> None:
        """Append a warning of the run to `warnings.jsonl`."""
        with (self.folder / WARNINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"update": update, "warning": text}) + "\n")

    def _keep_warnings(self, updates: int) -> None:
        """Remove the warnings of updates that a resumed run plays again."""
        path = self.folder / WARNINGS
        if not path.exists():
            return
        kept = [row for row in read_json_lines(path) if row.get("update", 0) <= updates]
        self.write(path.name, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        with atomic_file(self.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self.write(name, json.dumps(value, indent=2, default=str) + "\n")

    def draw_curves(self, kl_budget: float | None = None) -> None:
        """Plot the metrics so far into `curves.png`, and the KL budget where there is one."""
        if not self.history:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            note("matplotlib is not installed, so no curves are drawn: pip install 'textgym[plots]'")
            return
        counted = clock(self.history[0])
        curves = {title: key for title, key in CURVES.items() if any(key in row for row in self.history)}
        rows = math.ceil(len(curves) / 3)
        height = 3.25 * rows
        # Without pyplot, which would change a notebook's backend; with fixed margins, since a layout draws all twice.
        figure = Figure(figsize=(13, height))
        figure.subplots_adjust(0.06, 0.55 / height, 0.985, 1 - 0.35 / height, wspace=0.2, hspace=0.35)
        for place, (title, key) in enumerate(curves.items(), start=1):
            axis = figure.add_subplot(rows, 3, place)
            seen = [row for row in self.history if key in row]
            marker = "." if len(seen) < 50 else ""  # a line through a single point is invisible
            axis.plot([row[counted] for row in seen], [row[key] for row in seen], linewidth=1.5, marker=marker)
            if kl_budget is not None and key == "objective/kl":
                axis.axhline(kl_budget, linestyle="--", color="gray", label="budget")
                axis.legend(fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(counted, fontsize=9)
            axis.grid(alpha=0.3)
        with atomic_file(self.folder / "curves.png") as temporary:
            figure.savefig(temporary, dpi=110)

    def write_samples(self, columns: dict[str, Sequence[str]], prompts: Sequence[str]) -> None:
        """Write `samples.md`, a table of prompts and completions with one column per policy."""
        titles = " | ".join(markdown_cell(title) for title in columns)
        lines = [f"| prompt | {titles} |", "| --- " * (1 + len(columns)) + "|"]
        for row, prompt in enumerate(prompts):
            cells = [markdown_cell(text) for text in (prompt, *(texts[row] for texts in columns.values()))]
            lines.append("| " + " | ".join(cells) + " |")
        self.write("samples.md", "\n".join(lines) + "\n")

    def close(self) -> None:
        """Close the files, and let other processes have the folder."""
        self.metrics.close()
        self.events.close()
        self.claim.release()


def changed_settings(folder: Path, config: Any, free: Sequence[str]) -> list[str]:
    """Describe the settings of a run that differ from `config`, except the `free` ones.

    Args:
        folder: Folder of the run, with its `config.json`.
        config: A dataclass; the fields of its field `config` are compared as if they were its own.
        free: Names of fields that may differ.
    """
    path = folder / "config.json"
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFolderError(
            f"{path} cannot be read, so it is unknown with which settings the run began ({error}): put a copy of it "
            "there, or continue from a checkpoint in Python"
        ) from error
    now = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    idle = idle_options(type(config.config), was.get("config", {}))  # a resumed run leaves them out
    was, now = ({**settings.pop("config", {}), **settings} for settings in (was, now))
    names = [name for name in {**was, **now} if name not in (*free, *idle) and was.get(name) != now.get(name)]
    return [f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in names]


def _read_metrics(path: Path, updates: int) -> list[Metrics]:
    """Return the metrics of the first updates, one line each; with a warning, those that can be read."""
    rows = read_json_lines(path, updates)  # later ones are of updates that no checkpoint kept
    if len(rows) < updates:
        warnings.warn(
            f"{path} has the metrics of {len(rows)} of {updates} updates; those of the others are lost", stacklevel=3
        )
    return rows


class FiguresTable(Table):
    """A table of metrics that keeps its values as `figures`, by policy and name."""

    figures: Mapping[str, Mapping[str, float | str]]


def figures_table(title: str, rows: Mapping[str, Mapping[str, float | str]]) -> FiguresTable:
    """Return a table of metrics with one column per policy; values are numbers or formatted texts."""
    table = FiguresTable(title=rich_text(title), title_justify="left")
    table.figures = rows
    table.add_column("", overflow="fold")
    for label in rows:
        table.add_column(rich_text(label), justify="right", overflow="fold")
    for name in dict.fromkeys(name for figures in rows.values() for name in figures):
        cells = [_formatted(figures.get(name, "")) for figures in rows.values()]
        table.add_row(*map(rich_text, (name, *cells)))
    return table


def _formatted(figure: float | str) -> str:
    if isinstance(figure, str):
        return figure
    return f"{round(figure, 3) + 0.0:.3f}"  # adding 0.0 turns -0.0 into 0.0


def note(text: str) -> None:
    """Print what a run has to do without, and what to install."""
    Console().print(text, markup=False)  # with markup, [brackets] would be a style


class _NoEvents:
    """Stand-in for TensorBoard's writer if TensorBoard is not installed."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _summary_writer(folder: Path, last: Metrics | None) -> Any:
    """Return a writer of events that discards events after the `last` metrics."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        note("TensorBoard is not installed, so no events are written: pip install 'textgym[trackers]'")
        return _NoEvents()
    return SummaryWriter(str(folder), purge_step=None if last is None else int(last[clock(last)]) + 1)
