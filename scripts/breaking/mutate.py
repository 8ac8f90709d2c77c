"""Plant faults in the code, run the tests that reach them, and count how many are noticed.

    python scripts/breaking/mutate.py --faults 20 --seed 0
    python scripts/breaking/mutate.py --folders agents --faults 100 --output mutants.json

Faults are drawn by a seed from all places in the folders where an operator, a comparison, a condition or a constant can
be another one (faults.py). Each is planted alone, in a copy of the repository. Its tests are those that run its
statement, which one run of all tests under `coverage` finds; for a statement that runs at import, such as a default,
those that import the module, then those that import a module that imports it, and so on. They stop at the first
failure, and after two minutes' worth of tests. Tests that fail without a fault are left out. A fault that no test
notices is printed: either a test is missing, or the fault changes nothing, which a person has to decide.

The run under `coverage` takes a quarter of an hour. With `--reach` it is kept for the next time; delete the folder when
the code has changed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import coverage
import pytest
import tyro
from faults import ROOT, Fault, faults_of

# The tests run in forks of this process, so that what takes long to import is imported once.
PRELOADED = (
    "hypothesis",
    "peft",
    "stable_baselines3",
    "torch.fx.experimental.proxy_tensor",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_utils",
)


@dataclass
class Args:
    folders: tuple[str, ...] = ("agents", "textgym/rewards", "textgym/envs")
    """Folders or files to plant faults in."""
    tests: tuple[str, ...] = ("tests/agents", "tests/textgym")
    """Folders or files of tests that may run."""
    faults: int = 300
    """Number of faults."""
    seed: int = 0
    """Seed of the choice."""
    depth: int = 2
    """Number of steps over imports from a test to a module, for statements that run at import."""
    seconds: float = 120.0
    """Most seconds of tests for one fault, as long as they take without it; what these miss counts as missed."""
    output: Path | None = None
    """JSON file for the outcome of each fault, written after each; a run with the same file goes on from it."""
    reach: Path | None = None
    """Folder for what each test runs; it is used again if it exists."""


@dataclass
class Reach:
    """Which tests run which lines.

    Attributes:
        seconds: Seconds of each test that passed.
        failed: Tests that failed without a fault.
        lines: For each file, relative to the repository, the tests that run each line.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    def tests_of(self, fault: Fault) -> list[str]:
        """Return the tests that run the statement: file after file, those that take the least time first."""
        first, last = fault.statement
        at_lines = self.lines.get(fault.path, {})
        files: defaultdict[str, list[str]] = defaultdict(list)
        for test in {test for line in range(first, last + 1) for test in at_lines.get(line, [])}:
            if test in self.seconds:
                files[test.split("::")[0]].append(test)
        quickest_first = sorted(files.values(), key=lambda tests: sum(self.seconds[test] for test in tests))
        return [test for tests in quickest_first for test in sorted(tests, key=self.seconds.__getitem__)]

    def tests_in(self, files: Sequence[str]) -> list[str]:
        """Return the tests in files, file after file."""
        return [test for file in files for test in self.seconds if test.split("::")[0] == file]

    def first(self, tests: Sequence[str], seconds: float) -> tuple[list[str], float]:
        """Return the first tests that take at most so many seconds together, and what they take."""
        chosen: list[str] = []
        total = 0.0
        for test in tests:
            if total + self.seconds[test] > seconds:
                break
            chosen.append(test)
            total += self.seconds[test]
        return chosen, total


class Observer:
    """A pytest plugin that tells `coverage` which test runs, and keeps how long it takes and whether it passes."""

    def __init__(self, measured: coverage.Coverage, notes: Path) -> None:
        self.measured = measured
        self.notes = notes
        self.reach = Reach()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.measured.switch_context(item.nodeid)
        started = time.monotonic()
        outcome = yield
        self.reach.seconds[item.nodeid] = time.monotonic() - started
        return outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reach.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.measured.stop()
        self.measured.save()
        seconds = {test: taken for test, taken in self.reach.seconds.items() if test not in self.reach.failed}
        self.notes.write_text(json.dumps({"seconds": seconds, "failed": self.reach.failed}))


def in_a_fork(copy: Path, arguments: Sequence[str], timeout: float | None = None, observe: Path | None = None) -> int:
    """Run pytest in a copy of the repository, in a fork of this process; return its exit status, -1 if it hangs."""
    child = os.fork()
    if child == 0:
        _pytest_there(copy, arguments, observe)
    deadline = time.monotonic() + (timeout or 1e9)
    status = None
    while status is None and time.monotonic() < deadline:
        ended, wait_status = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(wait_status) if ended else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and the processes that the tests have started
    if status is None:
        os.waitpid(child, 0)
        return -1
    return status


def _pytest_there(copy: Path, arguments: Sequence[str], observe: Path | None) -> None:
    """Run pytest in this process, which ends with it."""
    status = 70
    try:
        os.setsid()
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.environ["OMP_NUM_THREADS"] = "1"
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        plugins = []
        if observe is not None:
            measured = coverage.Coverage(data_file=str(observe / "lines"), source=["agents", "textgym"])
            measured.set_option("run:relative_files", True)  # so that a later run, in another copy, can read them
            measured.start()
            plugins.append(Observer(measured, observe / "tests.json"))
        status = int(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *arguments], plugins=plugins))
    finally:
        os._exit(status)


def reach_of(tests: Sequence[str], copy: Path, folder: Path) -> Reach:
    """Return which tests run which lines, from a folder, or from a run of the tests if the folder has nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "tests.json"
    if not notes.exists():
        in_a_fork(copy, tests, observe=folder.resolve())
    reach = Reach(**json.loads(notes.read_text()))
    data = coverage.CoverageData(str(folder / "lines"))
    data.read()
    for name in data.measured_files():
        reach.lines[Path(name).as_posix()] = data.contexts_by_lineno(name)
    return reach


def module_of(path: Path) -> str:
    """Return the name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("textgym", *parts) if parts[0] == "agents" else parts)


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, with the names that it imports from them."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
            if source == "textgym.agents":  # each algorithm is a file of its own
                found |= {f"textgym.agents.{alias.name.removesuffix('Config').lower()}" for alias in node.names}
    return found


def importers_of(path: str, args: Args) -> tuple[str, ...]:
    """Return the test files that import a module, those with the shortest way first."""
    sources = [file for folder in ("agents", "textgym") for file in sorted((ROOT / folder).rglob("*.py"))]
    imports = {module_of(file): imports_of(file) for file in sources if file.name != "__init__.py"}
    tests = [file for name in args.tests for file in _files(ROOT / name, "test_*.py")]
    reached = {module_of(ROOT / path)}
    chosen: list[str] = []
    for _ in range(args.depth):
        chosen += [
            name
            for file in tests
            if (name := file.relative_to(ROOT).as_posix()) not in chosen and imports_of(file) & reached
        ]
        reached |= {module for module, imported in imports.items() if imported & reached}
    return tuple(chosen)


def _files(path: Path, pattern: str) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob(pattern))


def outcome_of(fault: Fault, reach: Reach, copy: Path, args: Args) -> str:
    """Plant a fault in a copy of the repository, run its tests, and return its outcome.

    That is "noticed", "hung" (which is noticed too), "missed", or "untested" if no test reaches the place.
    """
    reached = reach.tests_of(fault) or reach.tests_in(importers_of(fault.path, args))
    tests, seconds = reach.first(reached, args.seconds)
    if not tests:
        return "untested"
    original = (copy / fault.path).read_text(encoding="utf-8")
    (copy / fault.path).write_text(fault.source, encoding="utf-8")
    try:
        status = in_a_fork(copy, ["-x", *tests], timeout=30 + 3 * seconds)
    finally:
        (copy / fault.path).write_text(original, encoding="utf-8")
    return {-1: "hung", 0: "missed"}.get(status, "noticed")


def copied(folder: Path) -> Path:
    """Copy the repository; `textgym.agents` is the folder agents/ of the copy."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache"))
    (copy / "textgym" / "agents").symlink_to(copy / "agents", target_is_directory=True)
    return copy


def row_of(fault: Fault) -> dict[str, object]:
    """Return what is written of a fault: all but the source, as JSON has it."""
    fields: dict[str, object] = json.loads(json.dumps(asdict(fault)))
    del fields["source"]
    return fields


def write_outcomes(output: Path, chosen: list[Fault], outcomes: list[str]) -> None:
    """Write the outcomes of the first faults."""
    tried = zip(chosen, outcomes, strict=False)
    rows = [{**row_of(fault), "outcome": outcome} for fault, outcome in tried]
    output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def outcomes_so_far(output: Path | None, chosen: list[Fault]) -> list[str]:
    """Return the outcomes of the first faults that a run with this file has tried; empty without the file."""
    if output is None or not output.exists():
        return []
    rows = json.loads(output.read_text(encoding="utf-8"))
    for fault, row in zip(chosen, rows, strict=False):
        if row != {**row_of(fault), "outcome": row["outcome"]}:
            raise SystemExit(f"{output} is of other faults, or the code has changed since: delete it to begin anew")
    return [row["outcome"] for row in rows[: len(chosen)]]


def main(args: Args) -> None:
    files = [file for folder in args.folders for file in _files(ROOT / folder, "*.py")]
    everywhere = [fault for file in files for fault in faults_of(file)]
    chosen = random.Random(args.seed).sample(everywhere, min(args.faults, len(everywhere)))
    outcomes = outcomes_so_far(args.output, chosen)
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        reach = reach_of(args.tests, copy, args.reach or Path(folder) / "reach")
        print(f"{len(reach.seconds)} tests pass without a fault; {len(reach.failed)} fail: {reach.failed}")
        for index, fault in list(enumerate(chosen))[len(outcomes) :]:
            started = time.monotonic()
            outcomes.append(outcome_of(fault, reach, copy, args))
            seconds = time.monotonic() - started
            print(f"{index + 1:4} {outcomes[-1]:8} {fault.path}:{fault.line}, {seconds:.0f} s", flush=True)
            if outcomes[-1] in ("missed", "untested"):
                print(f"     - {fault.before}\n     + {fault.after}", flush=True)
            if args.output is not None:
                write_outcomes(args.output, chosen, outcomes)
    noticed = sum(outcome in ("noticed", "hung") for outcome in outcomes)
    print(f"{noticed} of {len(outcomes)} faults were noticed, {noticed / max(len(outcomes), 1):.1%}")


if __name__ == "__main__":
    main(tyro.cli(Args))
