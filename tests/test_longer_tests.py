"""`scripts/checks/longer_tests.py` writes its lists only if every test had its time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("code", "written"),
    [
        (pytest.ExitCode.OK, "tests/test_a.py::test_b\n"),
        (pytest.ExitCode.TESTS_FAILED, "tests/test_a.py::test_b\n"),
        (pytest.ExitCode.INTERRUPTED, "as before"),
        (pytest.ExitCode.INTERNAL_ERROR, "as before"),
    ],
)
def test_a_run_that_was_interrupted_leaves_the_lists(
    code: pytest.ExitCode, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts" / "checks")
    script = importlib.import_module("longer_tests")
    (tmp_path / "longer_tests.txt").write_text("as before")

    def run(options: list[str], plugins: list[Any]) -> pytest.ExitCode:
        plugins[0].seconds["tests/test_a.py::test_b[1]"] = 1.0
        return code

    monkeypatch.setattr(script, "TESTS", tmp_path)
    monkeypatch.setattr(pytest, "main", run)
    assert script.main() == code
    assert (tmp_path / "longer_tests.txt").read_text() == written
