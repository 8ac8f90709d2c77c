"""The scenarios of `tests/on_cuda` on a pretend GPU, in processes of their own, since it patches torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GROUPS = {
    "learn": ["test_agents.py", "test_two_gpus.py"],
    "play": ["test_environments.py", "test_policy.py", "test_pretend_device.py"],
    "keep": ["test_command.py", "test_saving.py"],
    "place": ["test_measurements.py", "test_placement.py", "test_sb3.py", "test_synchronisations.py"],
}
"""Pairs of about the same length, since to begin a process takes seconds and two workers run the tests."""


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_scenarios_hold_on_the_pretend_device(group: str) -> None:
    files = [str(TESTS / "on_cuda" / name) for name in GROUPS[group]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.pretend_cuda", "-p", "no:cacheprovider", *files],
        cwd=TESTS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_scenario_is_in_a_group() -> None:
    grouped = sorted(name for names in GROUPS.values() for name in names)
    assert grouped == sorted(path.name for path in (TESTS / "on_cuda").glob("test_*.py"))
