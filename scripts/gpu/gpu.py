"""Check and measure textgym on a GPU in at most five minutes, part by part, and write a page of it.

    make gpu                                   # all parts; writes benchmarks/results/gpu.md and gpu.json
    make gpu PART=decoding                     # one part again; its metrics replace the old ones on the page
    make gpu DEVICE=cpu                        # dry run: every line at toy size; writes build/gpu-cpu.md
    make gpu WHEELS=../wheels COMMIT=abc1234   # missing packages from a folder; the commit, if there is no git

It needs neither installation nor network: it runs textgym from this checkout, with PYTHON and its packages. A
part is a script in benchmarks/gpu/ with a time limit. If it fails, hangs or lacks a package, the page has a line about
it, and the next part starts. The page is written again after every metric.

Parts share a process, which imports torch once, until one of them fails; tests have processes of their own.

The exit code is 1 if a part failed or was stopped, and 0 otherwise, also if goals were missed or parts were skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bare_checkout import REQUIRED, install_missing, missing
from gpu_page import write_page
from gpu_workers import Workers, is_gpu

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Time limit of all parts together on a GPU, in seconds, with the unpacking of wheels."""


class Part(NamedTuple):
    """A script in benchmarks/gpu/.

    Attributes:
        title: Title on the page.
        seconds: About how long it takes on a GPU. It is not started if less than half of this is left.
        needs: Import names of the packages that it needs.
        alone: Whether it needs a process of its own.
        all_gpus: Whether it sees all GPUs; other parts see only the one that they measure.
    """

    title: str
    seconds: float
    needs: tuple[str, ...] = ()
    alone: bool = False
    all_gpus: bool = False


# In the order in which they run: the most important first, because there may be no time for the last ones. Without
# vLLM the times leave 20 seconds for the unpacking of wheels.
BASE = tuple(name for name in REQUIRED if name != "pytest")
PARTS = {
    "machine": Part("Machine", 20),
    "equalities": Part("Tests on the device", 40, ("pytest",), alone=True),
    "decoding": Part("Decoding beside generate", 35),
    "bandwidth": Part("Decoding beside the bandwidth of memory", 15),
    "large_update": Part("One update of PPO with 1.2B weights", 25),
    "grpo_trl": Part("GRPO beside TRL", 30),
    "ppo_trl": Part("PPO beside TRL", 30),
    "learning": Part("PPO learns, saves and resumes", 20),
    "adam8bit": Part("Adam's moments in 8 bits", 15, ("bitsandbytes",)),
    "stock_sb3": Part("Unmodified PPO of Stable-Baselines3", 20),
    "scenarios": Part("Scenarios on the device", 25, ("pytest",), alone=True, all_gpus=True),
    "chunks": Part("Log-probs by the size of their chunks", 5),
    "vllm_peer": Part("Decoding beside vLLM", 90, ("vllm",)),
}
NO_DEVICE = "no device"
LONGEST = 2.0
"""A part is stopped after so many times the time that it takes, unless the parts before it have left more."""
LONGEST_WITHOUT_LIMIT = 20.0
"""The same without a time limit, as for a single part or on a CPU: only a part that hangs is stopped."""


class Run(NamedTuple):
    """Arguments of this run."""

    device: str
    commit: str
    page: Path

    @property
    def kind(self) -> str:
        """The device as a part sees it: "cuda" for any GPU, because it sees only that one."""
        return "cuda" if is_gpu(self.device) else self.device

    @property
    def results(self) -> Path:
        """Path of the JSON file of the page."""
        return self.page.with_suffix(".json")


def git_commit() -> str:
    """Return the commit of this checkout, with a plus sign if files were changed; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load(path: Path) -> dict[str, Any]:
    """Return earlier results; empty if there is no file or it cannot be read."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        results = {}
    return {"parts": {}, **results} if isinstance(results, dict) else {"parts": {}}


def save(results: dict[str, Any], run: Run) -> None:
    """Write JSON and page to temporary files and rename them, so that a kill does not leave incomplete files."""
    run.page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((run.results, json.dumps(results, indent=1)), (run.page, write_page(results, list(PARTS)))):
        temporary = path.with_suffix(path.suffix + ".part")
        temporary.write_text(text + "\n")
        temporary.replace(path)


def run_part(name: str, run: Run, seconds: float, results: dict[str, Any], workers: Workers) -> None:
    """Run one part, print its output, and save after every metric."""
    part = PARTS[name]
    entry: dict[str, Any] = {
        "title": part.title,
        "command": f"make gpu PART={name}" + ("" if run.device == "cuda" else f" DEVICE={run.device}"),
        "commit": run.commit,
        "state": "running",
        "figures": [],
        "notes": [],
    }
    results["parts"][name] = entry
    print(f"\n{part.title} ({name}), at most {seconds:.0f} s", flush=True)

    lacking = missing((*BASE, *part.needs))
    if lacking:
        entry |= {"state": "skipped", "why": f"missing: {', '.join(lacking)}", "seconds": 0.0}
    else:
        run_script(name, run, seconds, entry, results, workers)
    why = f": {entry['why']}" if "why" in entry else ""
    print(f"  {entry['state']} after {entry['seconds']:.1f} s{why}", flush=True)
    if entry["state"] == NO_DEVICE:
        raise SystemExit(f"nothing can be measured on {run.device}: name another DEVICE, or make a dry run on the cpu")
    save(results, run)


def run_script(
    name: str, run: Run, seconds: float, entry: dict[str, Any], results: dict[str, Any], workers: Workers
) -> None:
    """Run a part's script in a worker, read its output, and stop it with all of its children at the time limit."""
    started = time.monotonic()
    worker = workers.take(PARTS[name])
    lines: list[str] = []
    code = None
    try:
        for line in worker.output_of(ROOT / "benchmarks" / "gpu" / f"{name}.py", run.kind, seconds):
            told = as_object(line)
            if told is None:
                lines.append(line.strip())
                print(f"  | {line.rstrip()}", flush=True)
            elif "ended" in told:
                code = told["ended"]
            else:
                note_told(told, entry, results)
                if entry["state"] != NO_DEVICE:  # otherwise the earlier results stay
                    save(results, run)
        code = worker.exit_code() if code is None else code
    except TimeoutError:
        entry |= {"state": "stopped", "why": f"over its time of {seconds:.0f} s"}
        code = None
    finally:
        if code != 0 or PARTS[name].alone:
            workers.stop(worker)

    entry["seconds"] = round(time.monotonic() - started, 1)
    if code:
        entry |= {"state": "failed", "why": lines[-1][:300] if lines else f"exit code {code}"}
    elif entry["state"] == "running":
        entry["state"] = "done"


def as_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line, see benchmarks/measuring/figures.py; `None` for any other line."""
    if not line.startswith("{"):
        return None
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


def note_told(told: dict[str, Any], entry: dict[str, Any], results: dict[str, Any]) -> None:
    """Store a metric, a note, the machine or a reason, and print it."""
    if "figure" in told:
        figure = told["figure"]
        entry["figures"].append(figure)
        print(f"  {spoken(figure)}", flush=True)
    elif "note" in told:
        entry["notes"].append(told["note"])
        print(f"  {told['note']}", flush=True)
    elif "machine" in told:
        results["machine"] = told["machine"]
    elif "skipped" in told:
        entry |= {"state": "skipped", "why": told["skipped"]}
    elif "no device" in told:
        entry |= {"state": NO_DEVICE, "why": told["no device"]}
    elif "failed" in told:
        entry |= {"state": "failed", "why": told["failed"]}


def spoken(figure: dict[str, Any]) -> str:
    """Return a metric as one line for the terminal."""
    value = figure["value"] if isinstance(figure["value"], str) else f"{figure['value']:.4g}"
    goal = f" (goal: {figure['goal']}, {verdict(figure)})" if "goal" in figure else ""
    note = f"  [{figure['note']}]" if figure["note"] else ""
    return f"{figure['name']}: {value} {figure['unit']}".rstrip() + goal + note


def verdict(figure: dict[str, Any]) -> str:
    return {True: "met", False: "missed", None: "not judged"}[figure["met"]]


def run_parts(names: list[str], run: Run, limit: float, results: dict[str, Any]) -> None:
    """Run parts until the time limit; parts that were not started are marked."""
    until = time.monotonic() + limit
    with Workers(run.device, ROOT) as workers:
        for index, name in enumerate(names):
            left = until - time.monotonic()
            if left < PARTS[name].seconds / 2:
                leave_out(name, left, run, results)
            else:
                run_part(name, run, time_for(name, left, names[index + 1 :]), results, workers)


def time_for(name: str, left: float, later: list[str]) -> float:
    """Return the time limit of a part: twice its usual time, or more if later parts leave it."""
    seconds = PARTS[name].seconds
    if left == float("inf"):
        return LONGEST_WITHOUT_LIMIT * seconds
    spare = left - sum(PARTS[other].seconds for other in later if not missing(PARTS[other].needs))
    return min(left, max(LONGEST * seconds, spare))


def leave_out(name: str, left: float, run: Run, results: dict[str, Any]) -> None:
    """Say that there was no time for a part; its earlier results stay."""
    why = f"{max(left, 0):.0f} s were left: run it by make gpu PART={name}"
    if results["parts"].get(name, {}).get("state") != "done":
        results["parts"][name] = {"title": PARTS[name].title, "state": "left out", "why": why, "seconds": 0.0}
    print(f"\n{PARTS[name].title} ({name}) left out: {why}", flush=True)
    save(results, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="", help=f"one of {', '.join(PARTS)}, or several with commas; default: all")
    parser.add_argument("--device", default="", help="cuda, cuda:1, cpu; default: cuda")
    parser.add_argument("--commit", default="", help="default: what git says")
    parser.add_argument("--wheels", default="", help="a folder of wheels, for packages that are missing")
    parser.add_argument("--page", type=Path, help="default: benchmarks/results/gpu.md, on a CPU build/gpu-cpu.md")
    parser.add_argument(
        "--limit", type=float, help=f"seconds of all parts; default {LIMIT:.0f}, none for PART or a CPU"
    )
    options = parser.parse_args()

    names = options.part.split(",") if options.part else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    device = options.device or "cuda"
    default = ROOT / "build" / "gpu-cpu.md" if device == "cpu" else ROOT / "benchmarks" / "results" / "gpu.md"
    run = Run(device, options.commit or git_commit(), (options.page or default).resolve())
    limit = options.limit or (float("inf") if options.part or device == "cpu" else LIMIT)

    started = time.monotonic()
    results = load(run.results)
    results |= {"commit": run.commit, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    for line in install_missing(options.wheels, ROOT):
        print(line, flush=True)
    try:
        run_parts(names, run, limit - (time.monotonic() - started), results)
    except KeyboardInterrupt:
        print("\nstopped; what was measured is on the page", flush=True)
    save(results, run)

    states = {name: results["parts"][name]["state"] for name in names if name in results["parts"]}
    print(f"\n{time.monotonic() - started:.0f} s; " + ", ".join(f"{name} {state}" for name, state in states.items()))
    print(f"page: {os.path.relpath(run.page)}")
    sys.exit(any(state in ("failed", "stopped", "running") for state in states.values()))


if __name__ == "__main__":
    main()
