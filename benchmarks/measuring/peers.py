"""Shared code of benchmarks against other libraries: a process for each side, taking turns; FLOPs; tables.

Other libraries are not dependencies of the project. They are installed in folders of their own and found by path. The
packages that TRL imports must be in a folder named site-packages, because `dill` treats modules elsewhere as user code
that it has to pickle, and then fails to hash them:

    pip install --target .peers/trl-1.16 --no-deps trl==1.16.0
    pip install --target .peers/trl-1.12 --no-deps trl==1.12.0
    pip install --target .peers/site-packages --no-deps datasets dill multiprocess pandas pyarrow python-dateutil xxhash

`make gpu WHEELS=folder` does the same with wheels of these packages, of both versions of TRL, and of liger-kernel.

Each side is a script in a process of its own, so that the sides do not share imports, caches or memory. A script does
one piece of work per request (`Side`, `Clock`), or only one (`run_script`, `say`).
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
    """Context manager: a process whose script does one piece of work per request, and times it with `Clock`.

    Args:
        libraries: Folders made by `pip install --target`; they come before the environment's own packages.
        threads: Number of OpenMP threads.
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
        """Request one piece of work; return the metrics of the script's clock, at least `seconds` and `cpu_seconds`."""
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
    """Clock in the script of a `Side`: call `start`, and `lap` after each piece of work."""

    def start(self) -> None:
        """Wait for the next request, with no work left on a GPU, because the other side's turn is next."""
        synchronize()
        sys.stdin.readline()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self, **figures: float) -> None:
        """Print the time and the metrics of a piece of work, and wait for the next request."""
        synchronize()
        spent = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
        say({**spent, **figures})
        self.start()


def synchronize() -> None:
    """Wait for the GPU, if this process uses one, so that its remaining work is not timed as part of the next work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_script(script: str | Path, *arguments: object, libraries: Paths = (), threads: int = 1) -> Figures:
    """Run a script in a process and return the first JSON object that it prints; the arguments are those of `Side`.

    Raises:
        RuntimeError: If the script fails; the message has the end of its output.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=_environment(libraries, threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return _first_object(done.stdout.splitlines())


def say(figures: Mapping[str, Any]) -> None:
    """Print metrics as JSON for `run_script` and `Side`."""
    print(json.dumps(figures), flush=True)


def in_turns(
    ours: Callable[[], Figures], theirs: Callable[[], Figures], repeats: int
) -> tuple[Figures, list[Figures], list[Figures]]:
    """Run both sides in turns, so that other load on the machine slows both.

    Returns:
        Median seconds of both sides; median, minimum and maximum of the paired ratios of wall time, ours / theirs; the
        median ratio of CPU time; and the metrics that each side printed.
    """
    mine, peers = [], []
    for repeat in range(repeats):  # the first side alternates, because a machine may slow down over time
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
    """Count floating-point operations of matrix products and attention, forward and backward."""
    from textgym.models.machine.flops import FlopCount

    with FlopCount() as count:
        run()
    return count.total


def report(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a Markdown table, each row as soon as it is known, and the unrounded numbers as JSON."""
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
    """Return the first line that is a JSON object; other lines are output of libraries.

    Raises:
        RuntimeError: If there is none, because the script ended early.
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
