"""textgym evaluate --pairwise-sheet, and textgym read-sheet: evaluation by people."""

from __future__ import annotations

import shlex

from textgym.agents.runs.evaluation import Samples
from textgym.agents.runs.human.sheets import read_sheets, write_sheet
from textgym.display import printable
from textgym.flags import Evaluate, ReadSheet


def write(command: Evaluate, samples: dict[str, Samples]) -> list[str]:
    """Write a sheet of two policies' samples; return lines that say where it is."""
    assert command.pairwise_sheet is not None
    prompts = [transcript["prompt"] for transcript in next(iter(samples.values())).transcripts]
    completions = {name: chosen.completions for name, chosen in samples.items()}
    table, page, key = write_sheet(command.pairwise_sheet, prompts, completions, command.seed)
    then = f"textgym read-sheet {shlex.quote(str(key))} FILE.csv ..."
    return [f"for raters: {table} or {page}", f"not for raters: {key}", f"then: {then}"]


def read(command: ReadSheet) -> None:
    """The win rate and the agreement of raters."""
    for line in read_sheets(command.key, command.sheets).lines():
        print(printable(line))
