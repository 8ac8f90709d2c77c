"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path that becomes `path` if all goes well; nothing of it is left if not."""
    target = Path(path)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class atomic_folder:
    """A folder that appears whole or not at all: written under a temporary name, then renamed over the target."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}-"))
        return self.temporary

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                message = f"could not write {self.folder}: {error}. Nothing was changed; free some space?"
                raise OSError(message) from error
            return
        self.temporary.chmod(0o755)
        old = self.folder.with_name(f".{self.folder.name}-old-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(old)
        self.temporary.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
