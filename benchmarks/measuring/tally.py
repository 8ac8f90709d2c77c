"""Run tests in this process, and tell the numbers of each file as soon as its last test has run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from measuring.figures import note, tell
from measuring.peers import say

SHOWN = 20
"""Names of failed tests on the page, at most."""
OPTIONS = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-o", "minversion=7"]
"""Without the plugins and options of pyproject.toml that may be missing here."""
OPTIONS += ["--continue-on-collection-errors"]  # a file whose imports fail does not keep the others from running


def run_tests(folder: str, device: torch.device) -> None:
    """Run the tests of a folder on a device."""
    os.environ |= {"TEXTGYM_DEVICE": str(device), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    tally = Tally()
    code = pytest.main([*OPTIONS, folder], plugins=[tally])
    if not tally.total:
        raise SystemExit(f"pytest ended with code {int(code)} before it ran a test")
    if tally.total["failed"]:
        say({"failed": f"{tally.total['failed']} tests failed"})
    elif code:
        say({"failed": f"pytest ended with code {int(code)}"})


class Tally:
    """Reports each failure at once and each file when it ends, so that a time limit loses nothing."""

    def __init__(self) -> None:
        self.file = ""
        self.counts: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        self.output = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # pytest captures the other one

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.count(report, "failed")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.count(report, report.outcome)

    def pytest_sessionfinish(self) -> None:
        self.tell_file()

    def count(self, report: Any, outcome: str) -> None:
        """Count a test; a failure is told at once."""
        file = report.nodeid.split("::")[0]
        if file != self.file:
            self.tell_file()
            self.file, self.counts = file, Counter()
        self.counts[outcome] += 1
        self.total[outcome] += 1
        if outcome == "failed" and self.total["failed"] <= SHOWN:
            lines = str(report.longrepr).splitlines()
            errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")] or lines[-1:]
            with self.told():
                note(f"failed: {report.nodeid}: {''.join(errors[:1])[:200]}")

    def tell_file(self) -> None:
        """Tell the numbers of the file whose tests have run."""
        if self.file:
            numbers = f"{self.counts['passed']} passed, {self.counts['skipped']} skipped"
            with self.told():
                tell(f"{self.file}: tests failed", self.counts["failed"], at_most=0, note=numbers)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Print to the real stdout, past pytest's capture."""
        with contextlib.redirect_stdout(self.output):
            print(flush=True)
            yield
