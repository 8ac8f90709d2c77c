"""textgym view, list, compare and data: what is known of runs and data, without a run."""

from __future__ import annotations

from rich.console import Console

from textgym.agents.runs.data_report import data_report
from textgym.agents.runs.history import Run, compared, draw_over_each_other, list_of
from textgym.display import printable
from textgym.flags import Compare, Data, ListRuns, View
from textgym.viewer.page import write_page


def show_data(command: Data) -> None:
    """What a model will read of a data set."""
    for line in data_report(command.file, command.model, command.reader, command.max_length, command.examples):
        print(printable(line))


def view(command: View) -> None:
    """Write the page of one or several runs."""
    page = write_page(command.runs, command.output_dir, command.single_file)
    print(f"open {page} in a browser")


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
