"""What benchmarks beside other libraries share: both sides in processes of their own, in turns; FLOPs; tables.

A peer is no dependency. It is installed beside the project and found by path. What TRL imports besides goes to a folder
called site-packages, since `dill` takes modules from anywhere else for the user's own and fails to hash them:

    pip install --target .peers/trl-1.16 --no-deps trl==1.16.0
    pip install --target .peers/trl-1.12 --no-deps trl==1.12.0
    pip install --target .peers/site-packages --no-deps datasets dill multiprocess pandas pyarrow python-dateutil xxhash

Each side is a script in a process of its own, so that neither side's imports, caches or memory touch the other's. It
does one piece of work when it is asked (`Side`, `Clock`), or one in all (`run_script`, `say`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

Figures = dict[str, Any]
Paths = Sequence[str | Path]


class Side:
    """A script that does one piece of work each time it is asked, timed by its `Clock`; a context manager.

    Args:
        libraries: folders that `pip install --target` filled; they come before the environment's own packages.
        threads: of OpenMP.
    """

    def __init__(self, script: str | Path, *arguments: object, libraries: Paths = (), threads: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=_environment(libraries, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def work(self) -> Figures:
        """Asks for one piece; returns what the script's clock says of it: at least `seconds` and `cpu_seconds`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        return _first_object(self.process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


class Clock:
    """The other end of a `Side`, in its script: `start`, then `lap` after each piece of work."""

    def start(self) -> None:
        """Waits until the next piece is asked for."""
        sys.stdin.readline()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self, **figures: float) -> None:
        """Says how long the piece took, and figures of it; then waits for the next."""
        spent = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
        say({**spent, **figures})
        self.start()


def run_script(script: str | Path, *arguments: object, libraries: Paths = (), threads: int = 1) -> Figures:
    """Runs a script in a process of its own and returns the first JSON object that it prints; arguments as of `Side`.

    Raises:
        RuntimeError: the script failed; with the end of what it wrote.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=_environment(libraries, threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return _first_object(done.stdout.splitlines())


def say(figures: Mapping[str, Any]) -> None:
    """Prints what `run_script` and `Side` read."""
    print(json.dumps(figures), flush=True)


def in_turns(
    ours: Callable[[], Figures], theirs: Callable[[], Figures], repeats: int
) -> tuple[Figures, list[Figures], list[Figures]]:
    """Lets both sides work in turns, so that a busy machine slows both.

    Returns:
        The median seconds of both sides, and median, least and greatest of the paired ratios, ours over theirs, of wall
        time, with the median ratio of CPU time beside it; then what each side said.
    """
    mine, peers = [], []
    for repeat in range(repeats):  # the side that goes first changes, since a machine may slow down steadily
        for side, said in ((ours, mine), (theirs, peers))[:: 1 if repeat % 2 == 0 else -1]:
            said.append(side())
    ratios = _ratios(mine, peers, "seconds")
    return (
        {
            "seconds": statistics.median(x["seconds"] for x in mine),
            "peer's seconds": statistics.median(x["seconds"] for x in peers),
            "wall time ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "CPU time ratio": statistics.median(_ratios(mine, peers, "cpu_seconds")),
        },
        mine,
        peers,
    )


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and attention, forward and backward."""
    from textgym.models.machine.flops import FlopCount

    with FlopCount() as count:
        run()
    return count.total


def report(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints a Markdown table, row by row as they come, and the same figures unrounded as JSON."""
    seen = []
    for row in rows:
        if not seen:
            print("| " + " | ".join(row) + " |\n" + "| --- " * len(row) + "|")
        print("| " + " | ".join(_short(value) for value in row.values()) + " |", flush=True)
        seen.append(row)
    print(json.dumps(seen), flush=True)


def _ratios(mine: list[Figures], peers: list[Figures], name: str) -> list[float]:
    return [one[name] / other[name] for one, other in zip(mine, peers, strict=True)]


def _environment(libraries: Paths, threads: int) -> dict[str, str]:
    paths = [*(str(Path(folder).absolute()) for folder in libraries), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def _first_object(lines: Iterable[str] | IO[str]) -> Figures:
    """The first line that is a JSON object, past whatever else a library prints.

    Raises:
        RuntimeError: there is none; the script ended before it said anything.
    """
    for line in lines:
        try:
            figures = json.loads(line)
        except ValueError:
            continue
        if isinstance(figures, dict):
            return figures
    raise RuntimeError("the script printed no JSON object; what it wrote to stderr says why")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
