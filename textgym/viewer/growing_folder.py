"""GrowingFolder: a folder of textgym's in which only those files are written that are new, for folders of many files.

`textgym.data.files.atomic_folder` writes a folder as a whole. Here a reader may find files that are missing, so files
are written in an order in which each one comes after those that it names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from textgym.data.files import atomic_file, check_free
from textgym.data.manifests import MANIFEST, manifest_text, owned

PLANNED = {"size": 0, "sha256": ""}
"""What the manifest says of a file before it is written."""


class GrowingFolder:
    """A folder that is written file by file, and has a manifest of its files.

    The manifest names a file before it is written, so that after a crash it is known to be textgym's. Files of others
    are left alone.

    Args:
        folder: The folder; a symbolic link to one is followed.
        kind: What it holds, such as "textgym viewer".
        made_by: What writes it, for the manifest.

    Raises:
        FileExistsError: If the folder has files and is none of the same kind.
    """

    def __init__(self, folder: str | os.PathLike[str], kind: str, made_by: str) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.kind, self.made_by = kind, made_by
        check_free(self.folder, kind, overwrite=True)
        manifest = owned(self.folder)
        self.files: dict[str, Any] = {} if manifest is None else dict(manifest.files)

    def update(self, keep: Collection[str], write: Mapping[str, Callable[[], str]]) -> None:
        """Write files one after another, and remove those that are to be neither kept nor written.

        Args:
            keep: Names of files that stay as they are.
            write: What to write, by name, in this order; a file that is there and has this text is left alone.

        Raises:
            FileExistsError: If there is a file of such a name that is not textgym's.
        """
        for name in write:
            if name not in self.files and (self.folder / name).exists():
                raise FileExistsError(
                    f"{self.folder / name} is not textgym's, and a file of that name is to be written: move it away"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        planned = {name: PLANNED for name in write if name not in self.files}
        if planned:
            self._write_manifest({**self.files, **planned})
        for name in keep:
            if self.files[name] == PLANNED:  # it was written just before a crash
                self.files[name] = _entry((self.folder / name).read_bytes())
        for name, text in write.items():
            self._write(name, text().encode("utf-8"))
        for name in self.files.keys() - set(keep) - write.keys():
            (self.folder / name).unlink(missing_ok=True)
            del self.files[name]
        self._write_manifest(self.files)

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        entry = _entry(data)
        there = path.exists()
        if there and self.files.get(name) == entry and path.stat().st_size == len(data):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if there:  # somebody may be reading it
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
        else:
            path.write_bytes(data)
        self.files[name] = entry

    def _write_manifest(self, files: Mapping[str, Any]) -> None:
        with atomic_file(self.folder / MANIFEST) as temporary:  # a cut one would not say that the folder is textgym's
            temporary.write_text(manifest_text(self.kind, self.made_by, files), encoding="utf-8")


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
