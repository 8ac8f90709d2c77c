"""What the viewer shows of a run folder: its curves, a list of its records, and where to look first."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from textgym.errors import DamagedFolderError
from textgym.viewer.highlights import Highlights
from textgym.viewer.records import NewerRecordError, read_record, records_of
from textgym.viewer.rows import RecordedRow, rows_of

MOST_POINTS = 2000
"""Points of a curve; of longer runs points at even distances are shown."""
MOST_PROMPTS = 500
"""Prompts whose responses are compared over the run."""
CLOCKS = ("episodes", "updates")


def read_run(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a run, without its records.

    A run may be in progress: the last line of its metrics, or a record, may be incomplete and is left out.

    Raises:
        DamagedFolderError: If the folder holds no run, or a newer version of textgym wrote a record.
    """
    _check_run(folder)
    warnings: list[str] = []
    highlights, records = Highlights(), []
    histories: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for path in records_of(folder):
        try:
            record = read_record(path)
            rows = rows_of(record)
        except NewerRecordError:
            raise
        except (DamagedFolderError, LookupError, TypeError) as error:
            warnings.append(f"{path.name} is left out: {error}")
            continue
        highlights.add(rows)
        for row in rows:
            histories[row.prompt].append((row.update, row.row))
        records.append({**_summary(rows), "update": record["update"], "episodes": record["episodes"]})
    return {
        "name": folder.resolve().name,
        "metrics": read_metrics(folder / "metrics.jsonl"),
        "config": _config(folder / "config.json"),
        "checkpoints": _checkpoints(folder),
        "records": records,
        "highlights": highlights.lists(),
        "histories": _repeated(histories),
        "warnings": warnings,
    }


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics of a run as columns, with the clock that counts its progress.

    Lines that are incomplete are left out. Metrics that a line lacks, or that are not finite, are `None`.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    if len(rows) > MOST_POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    clock = next((name for name in CLOCKS if rows and name in rows[0]), None)
    names = dict.fromkeys(name for row in rows for name in row if name not in CLOCKS)
    return {
        "clock": clock or "updates",
        "x": [row.get(clock, i + 1) for i, row in enumerate(rows)],
        "columns": {name: [_number(row.get(name)) for row in rows] for name in names},
    }


def _check_run(folder: Path) -> None:
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        is_run = run["kind"] == "textgym run"
    except (OSError, ValueError, TypeError, KeyError):
        is_run = False
    if not is_run:
        raise DamagedFolderError(
            f"{folder} is no run folder: it has no run.json of textgym's. Give the folder that was the --output-dir of "
            "textgym train"
        )


def _summary(rows: list[RecordedRow]) -> dict[str, Any]:
    scores = [row.outcomes["score"] for row in rows if row.outcomes["score"] is not None]
    kls = [row.total("kl") or 0.0 for row in rows]
    return {
        "rows": len(rows),
        "score": _mean(scores),
        "kl": _mean(kls),
        "length": _mean([float(row.outcomes["length"]) for row in rows]),
    }


def _mean(values: list[float]) -> float | None:
    return float(f"{sum(values) / len(values):.4g}") if values else None


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


def _repeated(histories: dict[str, list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """Return the prompts of several records with their places, those with the most records first."""
    repeated = [(prompt, places) for prompt, places in histories.items() if len({update for update, _ in places}) > 1]
    repeated.sort(key=lambda entry: -len({update for update, _ in entry[1]}))
    return [{"prompt": prompt, "places": places} for prompt, places in repeated[:MOST_PROMPTS]]
