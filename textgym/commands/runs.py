"""textgym view, list, compare and data: what is known of runs and data, without a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from textgym.agents.runs.data_report import data_report
from textgym.agents.runs.history import Run, compared, draw_over_each_other, is_running, list_of
from textgym.display import printable
from textgym.flags import Compare, Data, ListRuns, View
from textgym.viewer.page import Page

SECONDS = 3.0
"""From one look at a run to the next."""


def show_data(command: Data) -> None:
    """What a model will read of a data set."""
    for line in data_report(command.file, command.model, command.reader, command.max_length, command.examples):
        print(printable(line))


def view(command: View) -> None:
    """Write the page of one or several runs."""
    running = any_running(command.runs)
    page = Page(command.runs, command.output_dir)
    live = command.follow and running
    index = page.write_single_file() if command.single_file else page.write(live)
    print(f"open {index} in a browser", flush=True)
    if live:
        follow(command, page)
    elif running:
        print("a run is in progress: with --follow the page renews itself")


def follow(command: View, page: Page) -> None:
    """Write what is new whenever a run has new metrics, until all runs have ended."""
    seen = sizes(command.runs)
    try:
        while any_running(command.runs):
            started = time.monotonic()
            if (now := sizes(command.runs)) != seen:
                page.write(live=True)
                seen = now
            # Large runs are read less often, so that looking at a run does not slow it down.
            time.sleep(max(SECONDS, 10 * (time.monotonic() - started)))
    except KeyboardInterrupt:
        pass
    finally:
        page.write()


def any_running(folders: Sequence[Path]) -> bool:
    """Return whether a process is writing one of the runs."""
    return any(is_running(folder) for folder in folders)


def sizes(folders: Sequence[Path]) -> list[int]:
    """Return the sizes of the metrics of runs, which grow with each update."""
    files = [folder / "metrics.jsonl" for folder in folders]
    return [file.stat().st_size if file.exists() else 0 for file in files]


def list_runs(command: ListRuns) -> None:
    """A table of the runs in a folder."""
    console = Console()
    console.print(list_of(command.folder, console.width))


def compare(command: Compare) -> None:
    """A table and a picture of several runs."""
    runs = [Run.read(folder) for folder in command.runs]
    Console().print(compared(runs))
    draw_over_each_other(runs, command.output)
    print(f"curves: {command.output}")
