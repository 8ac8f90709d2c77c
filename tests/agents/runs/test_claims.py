"""A run folder belongs to one run and one process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from textgym.agents.runs.claims import RunClaim, remove_saved
from textgym.data.files import atomic_folder
from textgym.errors import RunFolderError
from textgym.viewer.records import records_of

HOLDER = """
import sys
from textgym.agents.runs.claims import RunClaim
claim = RunClaim(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_two_claims_exclude_each_other_and_name_the_process(tmp_path: Path) -> None:
    with RunClaim(tmp_path / "run"):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match=rf"run is in use by process {os.getpid()} on "):
                RunClaim(tmp_path / "run", **flags)
    RunClaim(tmp_path / "run").release()


@pytest.mark.slow
def test_the_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"):
            RunClaim(tmp_path / "run")
        process.kill()
    RunClaim(tmp_path / "run").release()


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    RunClaim(tmp_path / "run").release()
    first = json.loads((tmp_path / "run" / "run.json").read_text())["id"]
    RunClaim(tmp_path / "run", resume=True).release()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["id"] == first


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "textgym run", "format": 1}', "[1]", "\udcff"])
def test_a_run_json_of_another_program_or_version_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RunFolderError, match=r"run.json is not textgym's or is damaged|holds a run of format 1"):
        RunClaim(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_copies_of_records_are_files_of_others(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunClaim(run).release()
    (run / "records").mkdir()
    for name in ("update-000001.json.gz", "update-000001 (copy).json.gz", "update-1b.json.gz"):
        (run / "records" / name).write_text("")
    assert [path.name for path in records_of(run)] == ["update-000001.json.gz"]
    RunClaim(run, overwrite=True).release()
    left = {path.name for path in (run / "records").iterdir()}
    assert left == {"update-000001 (copy).json.gz", "update-1b.json.gz"}


def test_what_is_left_of_a_damaged_folder_is_removed_beside_files_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    with atomic_folder(folder, "textgym policy", "Test", {}) as temporary:
        for name in ("first", "second"):
            (temporary / name).write_text(name)
    (folder / "first").unlink()
    (folder / "notes.txt").write_text("mine")
    remove_saved(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_resuming_and_overwriting_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="give one of them"):
        RunClaim(tmp_path, resume=True, overwrite=True)
