"""Atomic writes of files and folders: after a crash or power cut they are either complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
"""Prefix of temporary names, by which `remove_leftovers` recognises them."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` afterwards; after an error, delete it."""
    target = Path(path)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        yield temporary
        # The order matters: a file system may write the new name to disk before the data, and after a power cut the
        # file would be empty. The folder holds the name, so it is flushed last.
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


class atomic_folder:
    """Context manager that writes a folder under a temporary name and renames it at the end.

    If the folder exists already, it is moved aside first, so for a moment there is no folder of this name. If that
    matters, use a new name for each write.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        name = f"{TEMPORARY}{self.folder.name}-"
        self.temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=name))
        return self.temporary

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                message = f"could not write {self.folder}: {error}. Nothing was changed; check the free disk space"
                raise OSError(message) from error
            return
        self.temporary.chmod(0o755)
        for path in self.temporary.rglob("*"):
            _flush(path)
        _flush(self.temporary)
        # Renaming over a folder works only if that folder is empty, so the old one has to be moved first.
        old = self.folder.with_name(f"{TEMPORARY}{self.folder.name}-old-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(old)
        self.temporary.rename(self.folder)
        _flush(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; if the process is killed meanwhile, the rest has a temporary name."""
    doomed = folder.with_name(f"{TEMPORARY}{folder.name}-gone-{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove all files and folders with temporary names; no other process may be writing to this folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _flush(path: Path) -> None:
    """Wait until a file's data, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
