"""What benchmarks beside other libraries share: paired runs in processes of their own, FLOPs counted, tables.

A peer is no dependency. It is installed beside the project and found by path:

    pip install --target .peers/trl --no-deps trl==1.16.0
    pip install --target .peers/datasets datasets

Each side of a comparison is a script that prints one JSON object in its last line, `say`. It runs in a process of its
own, so that neither side's imports, caches or threads touch the other's, and so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def run_script(
    script: str | Path, *arguments: object, libraries: Sequence[str | Path] = (), threads: int = 1
) -> Figures:
    """Runs a script in a fresh process and returns the JSON object of its last line.

    Args:
        libraries: folders that `pip install --target` filled; they come before the environment's own packages.
        threads: of OpenMP.

    Raises:
        RuntimeError: the script failed; with the end of what it wrote.
    """
    paths = [*(str(Path(folder).resolve()) for folder in libraries), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def say(figures: Mapping[str, Any]) -> None:
    """Prints what `run_script` reads."""
    print(json.dumps(figures), flush=True)


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> Figures:
    """Seconds of both sides, run in turns so that a busy machine slows both, and the median of the paired ratios."""
    pairs = []
    for repeat in range(repeats):  # the side that goes first changes, since the machine may slow down steadily
        first, second = (ours, theirs) if repeat % 2 == 0 else (theirs, ours)
        one, other = first(), second()
        pairs.append((one, other) if repeat % 2 == 0 else (other, one))
    ratios = [mine / peer for mine, peer in pairs]
    return {
        "ours_s": statistics.median(mine for mine, _ in pairs),
        "peer_s": statistics.median(peer for _, peer in pairs),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and attention, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def versions(*packages: str) -> dict[str, str]:
    """Of packages of this environment, for the record."""
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def report(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints a Markdown table, and the same figures unrounded as JSON."""
    rows = list(rows)
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(_short(value) for value in row.values()) + " |")
    print(json.dumps(rows), flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
