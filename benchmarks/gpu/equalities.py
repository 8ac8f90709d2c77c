"""Tests of tests/gpu and tests/on_cuda: float32 without TF32 equals the CPU up to rounding; bfloat16 is in its band."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from figures import note, skip, start, tell
from measuring.peers import say

ROOT = Path(__file__).parents[2]
SHOWN = 20
"""Names of failed tests on the page, at most."""


def run_tests(device: str, results: Path) -> int:
    """Run pytest without the plugins and options of pyproject.toml that may be missing here; return its exit code."""
    options = ["-o", "addopts=--import-mode=importlib", "-o", "minversion=7.0", "-p", "no:cacheprovider"]
    # -P: do not import from the current folder, where textgym has no `agents`.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", *options, f"--junitxml={results}"]
    environment = {**os.environ, "TEXTGYM_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    scenarios = ["tests/on_cuda"] if device.startswith("cuda") else []  # these tests choose the device themselves
    return subprocess.run([*command, "tests/gpu", *scenarios], cwd=ROOT, env=environment).returncode


def main() -> None:
    device = start(__doc__)
    if importlib.util.find_spec("pytest") is None:
        skip("pytest is missing")
    results = ROOT / "build" / "gpu" / f"tests-{device.type}.xml"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    code = run_tests(str(device), results)
    if not results.exists():
        raise SystemExit(f"pytest ended with code {code} before it ran a test")

    suite = next(ElementTree.parse(results).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    tell("tests passed", counts["tests"] - failed - counts["skipped"], note=f"{counts['skipped']} skipped")
    tell("tests failed", failed, at_most=0)
    cases = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    for case in cases[:SHOWN]:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = (problem.get("message") or "").splitlines() if problem is not None else []
        note(f"failed: {case.get('classname')}::{case.get('name')}: {message[0][:200] if message else ''}")
    if failed:
        say({"failed": f"{failed} tests failed"})


if __name__ == "__main__":
    main()
