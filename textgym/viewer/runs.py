"""What the viewer shows of a run folder: its curves, a list of its records, and where to look first."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textgym.data.files import read_json_lines
from textgym.viewer.highlights import Highlights
from textgym.viewer.summaries import Summary

MOST_POINTS = 2000
"""Points of a curve; of longer runs points at even distances are shown."""
MOST_PROMPTS = 500
"""Prompts whose responses are compared over the run."""
MOST_UPDATES = 100
"""Updates in which the responses to a prompt are compared; of more, some at even distances are."""
CLOCKS = ("episodes", "updates")


def describe_run(folder: Path, summaries: Sequence[Summary], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the index of a page has of a run.

    A run may be in progress: the last line of its metrics may be incomplete and is left out.

    Args:
        folder: The run folder.
        summaries: Those of its records, oldest update first.
        warnings: What is to be said of records that are left out.
    """
    highlights = Highlights()
    for summary in summaries:
        highlights.merge(summary["best"])
    return {
        "name": folder.resolve().name,
        "metrics": read_metrics(folder / "metrics.jsonl"),
        "config": _config(folder / "config.json"),
        "checkpoints": _checkpoints(folder),
        "records": [summary["figures"] for summary in summaries],
        "highlights": highlights.lists(),
        "histories": _histories(summaries),
        "warnings": list(warnings),
    }


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics of a run as columns, with the clock that counts its progress.

    Lines that are incomplete are left out. Metrics that a line lacks, or that are not finite, are `None`.
    """
    rows = _spread(read_json_lines(path), MOST_POINTS)
    clock = next((name for name in CLOCKS if rows and name in rows[0]), None)
    names = dict.fromkeys(name for row in rows for name in row if name not in CLOCKS)
    return {
        "clock": clock or "updates",
        "x": [row.get(clock, i + 1) for i, row in enumerate(rows)],
        "columns": {name: [_number(row.get(name)) for row in rows] for name in names},
    }


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _config(path: Path) -> dict[str, str]:
    """Return the settings of a run as short texts; those of the algorithm stand beside the others."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    own = config.pop("config", {})
    settings = {**config, **(own if isinstance(own, dict) else {})}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def _checkpoints(folder: Path) -> list[int]:
    """Return the updates of which there are checkpoints."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("checkpoints/step-*")]
    return sorted(int(match[1]) for match in found if match)


def _histories(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return the prompts of several records with the places of their rows, those with the most records first."""
    places: dict[str, dict[int, list[int]]] = defaultdict(dict)  # rows by update
    for summary in summaries:
        update = summary["figures"]["update"]
        for row, prompt in enumerate(summary["rows"]):
            places[summary["prompts"][prompt]].setdefault(update, []).append(row)
    repeated = sorted((item for item in places.items() if len(item[1]) > 1), key=lambda item: -len(item[1]))
    return [
        {
            "prompt": key,
            "places": [[update, row] for update in _spread(list(rows), MOST_UPDATES) for row in rows[update]],
        }
        for key, rows in repeated[:MOST_PROMPTS]
    ]


def _spread(items: list[Any], most: int) -> list[Any]:
    """Return at most so many items, at even distances from the first to the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
