"""LiveProgress: what a run shows while it trains: a live table on a terminal, a line for each update elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from textgym.display import show_all_characters

from ..common.rollout_agent import Metrics, RolloutAgent
from ..common.supervised import SupervisedAgent

Agent = RolloutAgent | SupervisedAgent
SHOWN = {
    "score": ("objective/scores", "{:+.3f}"),
    "KL": ("objective/kl", "{:.2f}"),
    "tokens": ("val/response_tokens", "{:.1f}"),
    "entropy": ("policy/entropy_avg", "{:.2f}"),
    "expl. var.": ("val/explained_variance", "{:.2f}"),
    "within prompts": ("val/explained_variance_within_prompts", "{:.2f}"),
    "held-out score": ("eval/score", "{:+.3f}"),
    "loss": ("loss", "{:.4f}"),
    "margin": ("rewards/margins", "{:+.3f}"),
    "ranked right": ("rewards/accuracies", "{:.2f}"),
    "lr": ("learning_rate", "{:.1e}"),
}
"""Columns of the table: a metric and its format. Those that an agent does not report are left out."""
ROWS = 8


def clock(metrics: Metrics) -> str:
    """Return the metric that counts an agent's progress; SFT and DPO have no episodes."""
    return "episodes" if "episodes" in metrics else "updates"


def rates(metrics: Metrics, episodes: int) -> dict[str, str]:
    """Return the episodes and tokens a second of an update, rollout and update together."""
    seconds = metrics["time/rollout_s"] + metrics["time/update_s"]
    tokens = episodes * metrics["val/response_tokens"]
    return {"episodes/s": f"{episodes / seconds:,.1f}", "tokens/s": f"{tokens / seconds:,.0f}"}


class LiveProgress:
    """Callback of agents that shows stage, progress, remaining time and the main metrics.

    A terminal shows a table of the last updates and a bar. Elsewhere (a file, a pipe, a notebook, `TERM=dumb`) every
    stage and every update is a line, written at once.

    Args:
        console: Where to show them; standard output by default.
        quiet: Whether to show nothing but what `say(..., always=True)` says.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        if console is None:
            show_all_characters(sys.stdout)  # a name or a reward's error must not end a run
        self.console = console or Console()
        self.quiet = quiet
        # A dumb terminal cannot move its cursor, so that a table would show at the end alone.
        self.on_terminal = self.console.is_terminal and not self.console.is_dumb_terminal and not quiet
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.recent: deque[dict[str, str]] = deque(maxlen=ROWS)
        self.live = Live(get_renderable=self._table, console=self.console, refresh_per_second=4)
        self.total: float | None = None
        self.first: tuple[float, float] | None = None  # when the first update was seen, and how far the stage was then

    def __enter__(self) -> Self:
        if self.on_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def say(self, text: Any, always: bool = False) -> None:
        """Print a text or a table above the progress; text from outside is never read as markup."""
        if always or not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=not self.on_terminal)

    def stage(self, description: str, total: float | None = None) -> None:
        """Begin the next stage, of `total` steps if known."""
        self.finish()
        self.total, self.first = total, None
        self.task = self.progress.add_task(description, total=total, note="")
        if not self.on_terminal:
            self.say(description)

    def advance(self, completed: float, note: str = "") -> None:
        """Set the number of completed steps of the current stage."""
        self.progress.update(self.task, completed=completed, note=note)

    def finish(self) -> None:
        """Complete the current stage."""
        for task in self.progress.tasks:
            if not task.finished:
                self.progress.update(task.id, total=task.total or 1, completed=task.total or 1)

    def __call__(self, agent: Agent, metrics: Metrics) -> None:
        """Show the metrics of an update."""
        counted = clock(metrics)
        row = {"update": f"{agent.updates}"}
        if counted == "episodes":
            row["episodes"] = f"{metrics['episodes']:,.0f}"
        row |= {name: form.format(metrics[key]) for name, (key, form) in SHOWN.items() if key in metrics}
        if isinstance(agent, RolloutAgent):
            row |= rates(metrics, agent.update_size)
        self.recent.append(row)
        self.advance(metrics[counted])
        left = self._seconds_left(metrics[counted])
        if not self.on_terminal:
            ended = {} if left is None else {"left": f"{left // 60:.0f}:{left % 60:02.0f}"}
            self.say("  ".join(f"{name} {value}" for name, value in {**row, **ended}.items()))

    def _seconds_left(self, counted: float) -> float | None:
        """Return the seconds to the end of the stage, from the second update seen on: the first one warms up."""
        if self.first is None:
            self.first = time.monotonic(), counted
            return None
        began, at = self.first
        if not self.total or counted <= at:
            return None
        return (self.total - counted) * (time.monotonic() - began) / (counted - at)

    def _table(self) -> Group:
        """Return the last updates above the bar, with as many columns as the terminal has room for."""
        table, room = Table(box=None, pad_edge=False), self.console.width
        for name in dict.fromkeys(name for row in self.recent for name in row):
            cells = [row.get(name, "") for row in self.recent]
            room -= max(map(len, [name, *cells])) + 2  # two spaces between columns
            if room < -2:
                break
            table.add_column(name, justify="right", no_wrap=True)
        names = [str(column.header) for column in table.columns]
        for row in self.recent:
            table.add_row(*(row.get(name, "") for name in names))
        return Group(table, self.progress) if names else Group(self.progress)


class TrainingProgress(TrainerCallback):
    """Callback of `transformers.Trainer` that shows its progress in the current stage of `LiveProgress`."""

    def __init__(self, live: LiveProgress) -> None:
        self.live = live

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the progress; the trainer calls this after each update."""
        loss = [row["loss"] for row in state.log_history if "loss" in row][-1:]
        self.live.advance(state.global_step / state.max_steps, f"loss {loss[0]:.3f}" if loss else "")
