"""`scripts/checks/longer_tests.py` writes its lists only if every test had its time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

CASES = [f"tests/agents/test_a.py::test_b[{case}]" for case in range(3)]
WRITTEN = {
    "longer_tests.txt": "tests/agents/test_a.py::test_b\n",
    "more_cases.txt": f"{CASES[1]}\n{CASES[2]}\n",  # two of the cases would take more than `CASES` seconds
}


@pytest.mark.parametrize(
    ("code", "written"),
    [
        (pytest.ExitCode.OK, WRITTEN),
        (pytest.ExitCode.TESTS_FAILED, WRITTEN),
        (pytest.ExitCode.INTERRUPTED, dict.fromkeys(WRITTEN, "as before")),
        (pytest.ExitCode.INTERNAL_ERROR, dict.fromkeys(WRITTEN, "as before")),
    ],
)
def test_a_run_that_was_interrupted_leaves_the_lists(
    code: pytest.ExitCode, written: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts" / "checks")
    script = importlib.import_module("longer_tests")
    for name in written:
        (tmp_path / name).write_text("as before")

    def run(options: list[str], plugins: list[Any]) -> pytest.ExitCode:
        plugins[0].seconds.update(dict.fromkeys(CASES, 0.2))
        return code

    monkeypatch.setattr(script, "TESTS", tmp_path)
    monkeypatch.setattr(pytest, "main", run)
    assert script.main() == code
    assert {name: (tmp_path / name).read_text() for name in written} == written
