"""Runs of the past: a list of those in a folder, and a comparison of several."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.table import Table

from textgym.data.files import atomic_file, read_json_lines
from textgym.data.manifests import RUN, read_run
from textgym.display import rich_text
from textgym.errors import RunFolderError
from textgym.rewards.intervals import bootstrap

from ..common.rollout_agent import Metrics
from .claims import LOCK
from .progress import clock
from .run_folder import CURVES

LONGEST_LINE = 10_000
END = 0.2
"""The last fifth of a run's updates is compared."""


@dataclass(frozen=True)
class Run:
    """What a run folder says of its run.

    Attributes:
        folder: The folder.
        settings: Those of the command.
        history: Metrics of each update.
        running: Whether a process is writing there now.
        finished: Whether it reached its end and was not stopped.
    """

    folder: Path
    settings: dict[str, Any]
    history: list[Metrics]
    running: bool
    finished: bool = False

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder, also while its run is writing: a line that is not whole yet is left out.

        Raises:
            RunFolderError: It holds no run, or one of another version.
        """
        finished = bool(read_run(folder).get("finished"))
        return cls(folder, _settings(folder), read_json_lines(folder / "metrics.jsonl"), is_running(folder), finished)

    @property
    def state(self) -> str:
        """`"running"`, `"finished"`, or `"stopped"`, which can be resumed."""
        if self.running:
            return "running"
        done = self.finished or (self.folder / "samples.md").exists()
        return "finished" if done else "stopped"


def runs_in(folder: Path) -> tuple[list[Run], list[str]]:
    """Return the runs in a folder and the folders below it, sorted by name, and what is wrong with the others.

    Raises:
        RunFolderError: There are none.
    """
    runs, problems = [], []
    for path in sorted(folder.rglob(RUN)):
        try:
            runs.append(Run.read(path.parent))
        except RunFolderError as error:
            problems.append(str(error))
    if not runs:
        first = shlex.quote(str(folder / "first"))
        raise RunFolderError(
            "; ".join(problems) or f"there are no runs in {folder}: `textgym train --output-dir {first}` begins one"
        )
    return runs, problems


def list_of(folder: Path, width: int) -> Group:
    """Return the runs in a folder, with progress, last score and KL; then the folders that were left out, and why.

    Args:
        folder: The folder.
        width: Characters of a line. It is a table if that has room for it, and otherwise a few lines for each run.
    """
    titles = ("run", "agent", "environment", "model", "state", "updates", "score", "KL")
    runs, problems = runs_in(folder)
    rows, left_out = [_about(run) for run in runs], [rich_text(f"left out: {problem}") for problem in problems]
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in ("updates", "score", "KL") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(rich_text, row))
    if Console(width=LONGEST_LINE).measure(table).maximum <= width:
        return Group(table, *left_out)
    lines = []
    for run, agent, environment, model, state, updates, score, kl in rows:
        figures = [f"{name} {figure}" for name, figure in (("score", score), ("KL", kl)) if figure]
        known = ([agent, environment, model], [state, f"{updates} updates"], figures)  # some have no agent, or no KL
        lines += [run, *(f"  {', '.join(filter(None, parts))}" for parts in known if any(parts))]
    return Group(*(rich_text(line) for line in lines), *left_out)


def _about(run: Run) -> list[str]:
    """Return the cells of a run in the list."""
    last = run.history[-1] if run.history else {}
    figures = [f"{last[key]:.3f}" if key in last else "" for key in ("objective/scores", "objective/kl")]
    names = [str(run.settings.get(key) or "") for key in ("agent", "env", "model")]
    return [str(run.folder), *names, run.state, str(len(run.history)), *figures]


def compared(runs: Sequence[Run]) -> Table:
    """Return a table of the last fifth of each run's updates: means with 95% intervals, by the bootstrap over updates.

    Raises:
        RunFolderError: A run has no metrics.
    """
    for run in runs:
        if not run.history:
            raise RunFolderError(f"{run.folder} has no metrics: its run did not reach the end of its first update")
    table = Table(title=f"mean over the last {END:.0%} of the updates, with 95% intervals", title_justify="left")
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(rich_text(str(run.folder)), justify="right", overflow="fold")
    for title, key in CURVES.items():
        cells = [_at_the_end(run, key) for run in runs]
        if any(cells):
            table.add_row(title, *cells)
    return table


def draw_over_each_other(runs: Sequence[Run], file: Path) -> None:
    """Plot the curves of several runs over each other, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves are drawn by matplotlib: pip install 'textgym[plots]'") from error
    curves = {title: key for title, key in CURVES.items() if any(key in row for run in runs for row in run.history)}
    figure = Figure(figsize=(13, 3.25 * -(-len(curves) // 3)), layout="constrained")
    for place, (title, key) in enumerate(curves.items(), start=1):
        axis = figure.add_subplot(-(-len(curves) // 3), 3, place)
        for run in runs:
            rows = [row for row in run.history if key in row]
            axis.plot(
                [row[clock(row)] for row in rows], [row[key] for row in rows], label=str(run.folder), linewidth=1.5
            )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _at_the_end(run: Run, key: str) -> str:
    values = np.array([row[key] for row in run.history if key in row])
    if not len(values):
        return ""
    last = values[-max(1, round(END * len(values))) :]
    return str(bootstrap(lambda rows: float(last[rows].mean()), range(len(last))))


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def is_running(folder: Path) -> bool:
    """Return whether a process holds a run's lock, which death releases, too."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
