"""Runs of every command that are killed at random moments: scripts/breaking/kill_runs.py, with a few kills of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "breaking" / "kill_runs.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_of_every_command_that_are_killed_and_resumed_end_as_undisturbed_ones() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "--kills", "18"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split("|") for line in result.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[1].strip() for row in rows] == ["ppo", "grpo", "dqn", "sft", "dpo", "reward-model"]
    assert sum(int(row[2]) for row in rows) == 18
