"""Runs that repeat themselves bit for bit: in the environment that they need, which must be set before torch starts.

Outside Intel, MKL rounds differently for differently aligned memory unless `MKL_CBWR` is set; with several threads, the
order of sums may depend on which is faster. Every other test holds without these.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from textgym import deterministic_environment
from textgym.models.machine.determinism import missing_variables


@pytest.mark.slow
@pytest.mark.timeout(7200)  # it runs many tests, each of which has the time of one
@pytest.mark.skipif("MKL_CBWR" not in missing_variables(), reason="the tests marked bit_for_bit run in this process")
@pytest.mark.parametrize("tests", ["agents", "textgym"])
def test_promises_of_equal_bits_hold_where_what_they_need_is_set(tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "bit_for_bit", str(Path(__file__).parent / tests)]
    result = subprocess.run(
        command, env=os.environ | deterministic_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "needs MKL_CBWR" not in result.stdout
