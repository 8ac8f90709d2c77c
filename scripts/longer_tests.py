"""Note the tests that take longer than a moment, which `make test-fast` leaves out.

    python scripts/longer_tests.py

Runs the tests of `make test` in one process, in about ten minutes, and writes `tests/longer_tests.txt`. It counts CPU
seconds of a test and of the processes that it starts: they depend less than the clock on what else runs. A new test
that is not in the file belongs to the fast ones.
"""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

MOMENT = 0.06  # CPU seconds
FILE = Path(__file__).parents[1] / "tests" / "longer_tests.txt"


class Clock:
    """Keeps the most CPU seconds of a function's cases."""

    def __init__(self) -> None:
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        before = sum(os.times()[:4])
        outcome = yield
        name = item.nodeid.split("[")[0]
        self.seconds[name] = max(self.seconds[name], sum(os.times()[:4]) - before)
        return outcome


def main() -> int:
    clock = Clock()
    failed = pytest.main(["-q", "-n", "0"], plugins=[clock])
    if not failed:
        longer = sorted(name for name, seconds in clock.seconds.items() if seconds > MOMENT)
        FILE.write_text("".join(f"{name}\n" for name in longer))
    return failed


if __name__ == "__main__":
    sys.exit(main())
