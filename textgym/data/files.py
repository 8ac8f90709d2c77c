"""Atomic writes of files and folders: after a crash or power cut they are either complete or absent.

Folders get a manifest, see `textgym.data.manifests`, and only folders with one are ever written over.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textgym.data.manifests import MANIFEST, owned, write_manifest

TEMPORARY = ".textgym-tmp-"
"""Prefix of temporary names, by which `remove_leftovers` recognises them."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` afterwards; after an error, delete it."""
    target = Path(path)
    temporary = _temporary(target)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        # The order matters: a file system may write the new name to disk before the data, and after a power cut the
        # file would be empty. The folder holds the name, so it is flushed last.
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_json_lines(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line; lines that hold none are left out, such as one that is cut.

    Args:
        path: The file; if it does not exist, there are none.
        most: How many lines to read, damaged ones included; `None` for all.
    """
    rows = []
    for line in path.read_bytes().splitlines()[:most] if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class atomic_folder:
    """Context manager that writes a folder under a temporary name, adds a manifest, and renames it at the end.

    A folder that has files is left alone, unless `overwrite` is set and its manifest says that textgym wrote it as a
    folder of the same kind. Files in it that are not in its manifest are somebody else's, and are kept. A symbolic link
    to a folder is followed.

    If the folder exists already, it is moved aside first, so for a moment there is no folder of this name. If that
    matters, use a new name for each write.

    Args:
        folder: The folder to write.
        kind: What it holds, such as "policy".
        made_by: Name of the class that is saved, for the manifest.
        config: Its settings as plain values, for the manifest.
        overwrite: Whether to replace a folder of the same kind.

    Raises:
        FileExistsError: If the folder has files and is not to be overwritten.
        OSError: If the disk is full or the folder cannot be written. An existing folder is then unchanged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kind: str,
        made_by: str,
        config: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.kind, self.made_by, self.config, self.overwrite = kind, made_by, config, overwrite

    def __enter__(self) -> Path:
        check_free(self.folder, self.kind, overwrite=self.overwrite)
        with _explained(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = _temporary(self.folder)
            self.temporary.mkdir()
        return self.temporary

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        try:
            with _explained(self.folder):
                if error is not None:
                    raise error
                self._finish()
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _finish(self) -> None:
        write_manifest(self.temporary, self.kind, self.made_by, self.config)
        old = _temporary(self.folder)
        if self.folder.exists():
            _copy_foreign_files(self.folder, self.temporary)
        for path in self.temporary.rglob("*"):
            _flush(path)
        _flush(self.temporary)
        # Renaming over a folder works only if that folder is empty, so the old one has to be moved first.
        if self.folder.exists():
            self.folder.rename(old)
        self.temporary.rename(self.folder)
        _flush(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_free(folder: str | os.PathLike[str], kind: str, *, overwrite: bool = False) -> None:
    """Check that a folder may be written: it is not there, is empty, or is ours and to be overwritten.

    What a killed process left under a temporary name does not count.

    Args:
        folder: The folder.
        kind: What is to be written.
        overwrite: Whether to replace a folder of the same kind.

    Raises:
        FileExistsError: If it may not.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a folder of that name is to be written: choose another name")
    if all(path.name.startswith(TEMPORARY) for path in folder.iterdir()):
        return
    there = owned(folder)
    if there is None:
        raise FileExistsError(
            f"{folder} has files that textgym did not write (there is no {MANIFEST} of its own), so nothing is written "
            "there: choose another folder, or empty this one yourself"
        )
    if there.kind != kind:
        raise FileExistsError(f"{folder} holds a {there.kind}, and a {kind} is to be written: choose another folder")
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds a {there.kind} already: choose another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder; if the process is killed meanwhile, the rest has a temporary name."""
    doomed = _temporary(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove all files and folders with temporary names; no other process may be writing to this folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _temporary(target: Path) -> Path:
    """Return a name beside the target that nobody can predict; the suffix stays, since writers go by it."""
    return target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{target.name}")


def _copy_foreign_files(old: Path, new: Path) -> None:
    """Copy files that textgym did not write; they are copied before the folders change places, so none can be lost."""
    manifest = owned(old)
    mine = {MANIFEST, *(manifest.files if manifest is not None else ())}
    for path in old.rglob("*"):
        name = path.relative_to(old)
        if path.is_dir() or name.as_posix() in mine:
            continue
        if (new / name).exists():
            raise FileExistsError(f"{path} is not textgym's, and a file of that name is to be written: move it away")
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, new / name, follow_symlinks=False)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say of errors of writing, safetensors' among them, that the old folder is still there."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileExistsError) or not _is_of_writing(error):
            raise
        raise OSError(
            f"could not write {folder}: {error}. Nothing was changed; check the free disk space and the permissions"
        ) from error


def _is_of_writing(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _flush(path: Path) -> None:
    """Wait until a file's data, or a folder's list of names, is on the disk."""
    if os.name == "nt" or path.is_symlink():  # Windows cannot open folders; a link's target is not ours
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
