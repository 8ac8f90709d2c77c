"""Plant faults in the code, run the tests that reach them, and count how many are noticed.

    python scripts/mutate.py --faults 20 --seed 0
    python scripts/mutate.py --folders agents --tests tests/agents --faults 100 --output mutants.json

Faults are drawn by a seed from all places in the folders where an operator, a comparison, a condition or a constant can
be another one. Each is planted alone, in a copy of the repository. Its tests are those that import the module, then
those that import a module that imports it, and so on; they must pass without the fault, which is tried first, and they
stop at the first failure. A fault that no test notices is printed: either a test is missing, or the fault changes
nothing, which a person has to decide.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
"""Operators and comparisons, and what replaces each."""


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
    """Number of steps from a test to the module, over imports."""
    timeout: float = 300.0
    """Seconds for the tests of one fault; a fault that makes them hang is noticed."""
    output: Path | None = None
    """JSON file for the outcome of each fault, written after each; a run with the same file goes on from it."""


@dataclass(frozen=True)
class Fault:
    """A fault at one place.

    Attributes:
        path: The file, relative to the repository.
        line: Line number.
        before: The expression as it is.
        after: The expression as it becomes.
        source: The whole file with the fault.
    """

    path: str
    line: int
    before: str
    after: str
    source: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node may become: the same with another operator, condition or constant."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not isinstance(node.left, ast.JoinedStr):
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


def annotations(tree: ast.AST) -> set[int]:
    """Return the ids of nodes that do not run: annotations, whose operators make types."""
    found: set[int] = set()
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.AST):
                found |= {id(part) for part in ast.walk(annotation)}
    return found


def faults_of(path: Path) -> Iterator[Fault]:
    """Yield all faults of a file, one for each place and variant."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    tree, data = ast.parse(text), text.encode()
    idle = annotations(tree)
    for node in ast.walk(tree):
        if id(node) in idle or not isinstance(node, ast.expr):
            continue
        for variant in variants(node):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = f"({ast.unparse(ast.fix_missing_locations(variant))})"
            source = (data[:begin] + after.encode() + data[end:]).decode()
            yield Fault(path.relative_to(ROOT).as_posix(), node.lineno, data[begin:end].decode(), after, source)


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


def tests_of(path: str, args: Args) -> tuple[str, ...]:
    """Return the test files that reach a module, those with the shortest way first."""
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


def passes(tests: tuple[str, ...], copy: Path, timeout: float | None = None) -> bool:
    """Run tests in a copy of the repository until the first failure, and return whether all passed."""
    environment = {**os.environ, "PYTHONPATH": f"{copy}", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, env=environment, timeout=timeout, capture_output=True).returncode == 0


def outcome_of(fault: Fault, tests: tuple[str, ...], copy: Path, timeout: float) -> str:
    """Plant a fault in a copy of the repository, run its tests, and return "noticed", "hung" or "missed"."""
    original = (copy / fault.path).read_text(encoding="utf-8")
    (copy / fault.path).write_text(fault.source, encoding="utf-8")
    try:
        return "missed" if passes(tests, copy, timeout) else "noticed"
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        (copy / fault.path).write_text(original, encoding="utf-8")


def copied(folder: Path) -> Path:
    """Copy the repository; `textgym.agents` is the folder agents/ of the copy."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache"))
    (copy / "textgym" / "agents").symlink_to(copy / "agents", target_is_directory=True)
    return copy


def write_outcomes(output: Path, chosen: list[Fault], outcomes: list[str]) -> None:
    """Write the outcomes of the first faults."""
    tried = zip(chosen, outcomes, strict=False)
    rows = [{**asdict(fault), "source": None, "outcome": outcome} for fault, outcome in tried]
    output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def outcomes_so_far(output: Path | None, chosen: list[Fault]) -> list[str]:
    """Return the outcomes of the first faults that a run with this file has tried; empty without the file."""
    if output is None or not output.exists():
        return []
    rows = json.loads(output.read_text(encoding="utf-8"))
    for fault, row in zip(chosen, rows, strict=False):
        if {**asdict(fault), "source": None} != {name: row[name] for name in asdict(fault)}:
            raise SystemExit(f"{output} is of other faults, or the code has changed since: delete it to begin anew")
    return [row["outcome"] for row in rows[: len(chosen)]]


def main(args: Args) -> None:
    files = [file for folder in args.folders for file in _files(ROOT / folder, "*.py")]
    everywhere = [fault for file in files for fault in faults_of(file)]
    chosen = random.Random(args.seed).sample(everywhere, min(args.faults, len(everywhere)))
    outcomes = outcomes_so_far(args.output, chosen)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        sound: set[tuple[str, ...]] = set()  # sets of tests that pass without a fault
        for index, fault in list(enumerate(chosen))[len(outcomes) :]:
            tests = tests_of(fault.path, args)
            if tests and tests not in sound and not passes(tests, copy):
                raise SystemExit(f"these tests fail without a fault, so they say nothing: {' '.join(tests)}")
            sound.add(tests)
            started = time.monotonic()
            outcomes.append(outcome_of(fault, tests, copy, args.timeout) if tests else "untested")
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
