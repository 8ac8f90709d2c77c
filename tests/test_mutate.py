"""scripts/breaking/mutate.py goes on from where it was stopped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "breaking" / "mutate.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, without copies of the repository and runs of its tests."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutate", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "copied", lambda folder: folder)
    monkeypatch.setattr(module, "reach_of", lambda *_: module.Reach())
    return module


def test_a_stopped_run_goes_on_and_tries_each_fault_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, tried = tmp_path / "faults.json", []

    def outcome_of(fault: object, *_: object) -> str:
        if len(tried) == 3 and not again:
            raise KeyboardInterrupt
        tried.append(fault)
        return "missed" if len(tried) == 2 else "noticed"

    monkeypatch.setattr(script, "outcome_of", outcome_of)
    args = script.Args(folders=("agents/rloo.py",), faults=5, output=output)
    again = False
    with pytest.raises(KeyboardInterrupt):
        script.main(args)
    again = True
    script.main(args)
    assert len(tried) == len(set(tried)) == 5
    assert "4 of 5 faults were noticed" in capsys.readouterr().out


def test_a_file_of_other_faults_is_refused(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "faults.json"
    monkeypatch.setattr(script, "outcome_of", lambda *_: "noticed")
    script.main(script.Args(folders=("agents/rloo.py",), faults=2, output=output))
    with pytest.raises(SystemExit, match="other faults"):
        script.main(script.Args(folders=("agents/rloo.py",), faults=2, seed=1, output=output))
