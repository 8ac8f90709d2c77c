"""Folders that are saved: nothing of somebody else's is lost, and damage is found and named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from textgym.data import files
from textgym.data.files import TEMPORARY, atomic_file, atomic_folder
from textgym.data.manifests import MANIFEST, checked_manifest
from textgym.errors import DamagedFolderError


def write(folder: Path, text: str = "weights", kind: str = "textgym policy", overwrite: bool = False) -> None:
    with atomic_folder(folder, kind, "Policy", {"size": 1}, overwrite=overwrite) as temporary:
        (temporary / "part").mkdir()
        (temporary / "model.bin").write_text(text)
        (temporary / "part" / "settings.json").write_text("{}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- nothing of the user's is lost ---


def test_a_folder_with_foreign_files_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"thesis has files that textgym did not write"):
            write(folder, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis/chapter.tex": b"years of work"}


def test_a_folder_of_ours_is_replaced_only_if_asked(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    with pytest.raises(FileExistsError, match=r"holds a textgym policy already: .* overwrite=True"):
        write(tmp_path / "policy", "new")
    with pytest.raises(FileExistsError, match=r"holds a textgym policy, and a textgym agent is to be written"):
        write(tmp_path / "policy", "new", kind="textgym agent", overwrite=True)
    assert contents(tmp_path / "policy")["model.bin"] == b"weights"
    write(tmp_path / "policy", "new", overwrite=True)
    assert contents(tmp_path / "policy")["model.bin"] == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_foreign_files_in_a_folder_of_ours_stay(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    (tmp_path / "policy" / "notes.txt").write_text("mine")
    (tmp_path / "policy" / "part" / "more.txt").write_text("mine too")
    write(tmp_path / "policy", "new", overwrite=True)
    after = contents(tmp_path / "policy")
    assert (after["notes.txt"], after["part/more.txt"], after["model.bin"]) == (b"mine", b"mine too", b"new")
    write(tmp_path / "policy", "newer", overwrite=True)
    assert contents(tmp_path / "policy")["notes.txt"] == b"mine"


def test_a_link_to_a_folder_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "policy").symlink_to(tmp_path / "disk")
    write(tmp_path / "policy")
    assert (tmp_path / "policy").is_symlink()
    assert (tmp_path / "disk" / "model.bin").read_text() == "weights"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("mine")
    (tmp_path / "other").symlink_to(tmp_path / "foreign")
    with pytest.raises(FileExistsError, match="did not write"):
        write(tmp_path / "other", overwrite=True)
    assert contents(tmp_path / "foreign") == {"file": b"mine"}


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "policy", overwrite=True)
    assert (tmp_path / "policy").read_text() == "mine"


def test_temporary_names_are_unpredictable_and_made_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for _ in range(3):
        with atomic_file(tmp_path / "report.json") as temporary:
            temporary.write_text("{}")
            names.add(temporary.name)
    assert len(names) == 3
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / f"{TEMPORARY}guessed-report.json").symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "report.json") as temporary:
        temporary.write_text("overwritten")
    assert victim.read_text() == "mine"


# --- errors of the disk ---


@pytest.mark.parametrize("when", ["writing", "fsync", "rename"])
def test_an_error_of_the_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A full disk is noticed while writing; a network file system may say so only at fsync."""
    write(tmp_path / "policy")
    before = contents(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"writing": (Path, "write_text"), "fsync": (os, "fsync"), "rename": (Path, "rename")}[when]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError, match=r"could not write .*policy: .*No space left.* check the free disk space"):
        write(tmp_path / "policy", "new", overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before


# --- manifests ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Any] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "swapped": lambda path: path.write_bytes(b"another file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.bin", "part/settings.json", MANIFEST])
def test_every_damage_is_found_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "policy")
    assert checked_manifest(tmp_path / "policy", "textgym policy").config == {"size": 1}
    DAMAGES[damage](tmp_path / "policy" / name)
    if (name, damage) == (MANIFEST, "flipped"):
        pytest.skip("may be a flipped bit in a name or a version, which changes nothing that is checked")
    with pytest.raises(DamagedFolderError, match=Path(name).name):
        checked_manifest(tmp_path / "policy", "textgym policy")


def test_another_format_is_refused_with_its_version(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    manifest = json.loads((tmp_path / "policy" / MANIFEST).read_text())
    manifest |= {"format": 9, "versions": {"textgym": "3.1"}}
    (tmp_path / "policy" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedFolderError, match=r"format 9 \(textgym 3.1\), and this version reads format 2"):
        checked_manifest(tmp_path / "policy")
