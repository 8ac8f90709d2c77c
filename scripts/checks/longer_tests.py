"""Note what takes long, for `make test-fast` and `make test`.

    python scripts/checks/longer_tests.py

Runs the tests in one process, in about ten minutes, and writes two files:

- `tests/longer_tests.txt`: functions that take longer than a moment. `make test-fast` leaves them out.
- `tests/more_cases.txt`: of a function with many cases in `tests/textgym` or `tests/agents`, all but the first that
  take a quarter of a second together. They are slow tests, so `make test` has some cases of everything, and
  `make test-slow` the rest. Examples, docstrings and documentation (in `tests`) always run.

A failed test has its time too; a run that is interrupted leaves both files as they are.

It counts CPU seconds of a test and of the processes that it starts: they depend less than the clock on what else runs.
A new test that is in neither file runs always.
"""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

MOMENT = 0.06  # CPU seconds of a case
CASES = 0.25  # CPU seconds of the cases of a function
TESTS = Path(__file__).parents[2] / "tests"


class Clock:
    """Keeps the CPU seconds of each case, in the order in which they run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        before = sum(os.times()[:4])
        outcome = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - before
        return outcome


def longer_tests(seconds: dict[str, float]) -> list[str]:
    """Return the functions with a case that takes longer than a moment."""
    return sorted({case.split("[")[0] for case, taken in seconds.items() if taken > MOMENT})


def more_cases(seconds: dict[str, float]) -> list[str]:
    """Return the cases of functions whose earlier cases take `CASES` seconds; each function keeps at least one case."""
    kept: collections.defaultdict[str, float] = collections.defaultdict(float)
    left_out: list[str] = []
    for case, taken in seconds.items():
        function = case.split("[")[0]
        in_a_room = case.startswith(("tests/textgym/", "tests/agents/"))
        if in_a_room and function in kept and kept[function] + taken > CASES:
            left_out.append(case)
        else:
            kept[function] += taken
    return sorted(left_out)


def main() -> int:
    clock = Clock()
    code = pytest.main(["-q", "-n", "0", "--all-cases"], plugins=[clock])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return code  # it was interrupted: the times of the other tests are not known

    for name, lines in {"longer_tests": longer_tests, "more_cases": more_cases}.items():
        (TESTS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines(clock.seconds)))
    return code


if __name__ == "__main__":
    sys.exit(main())
