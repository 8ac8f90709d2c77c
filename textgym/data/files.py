"""Files and folders that appear whole or not at all, whatever kills the process or the machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
"""What temporary names begin with; `remove_leftovers` knows them by it."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path that becomes `path` if all goes well; nothing of it is left if not."""
    target = Path(path)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


class atomic_folder:
    """A folder that appears whole or not at all: written under a temporary name, then renamed over the target.

    A target that exists is moved aside first, so for a moment there is none: where even that may not be, write under a
    new name each time.
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
                message = f"could not write {self.folder}: {error}. Nothing was changed; free some space?"
                raise OSError(message) from error
            return
        self.temporary.chmod(0o755)
        for path in self.temporary.rglob("*"):
            _flush(path)
        _flush(self.temporary)
        old = self.folder.with_name(f"{TEMPORARY}{self.folder.name}-old-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(old)
        self.temporary.rename(self.folder)
        _flush(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder whole: a process that is killed meanwhile leaves the rest under a temporary name."""
    going = folder.with_name(f"{TEMPORARY}{folder.name}-gone-{os.getpid()}")
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder under temporary names; nobody else may be writing there."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk, so that a power cut cannot undo it."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
