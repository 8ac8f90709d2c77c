"""Manifests: what a saved folder holds, with the size and SHA-256 of every file, so that damage is found and named.

A manifest is written last, so a folder that has one was written to its end. It also marks the folder as textgym's own.
A run folder, which grows, has a `run.json` instead.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from textgym.errors import DamagedFolderError, RunFolderError
from textgym.settings import Check, from_plain

MANIFEST, RUN = "textgym_manifest.json", "run.json"
RUN_KIND = "textgym run"
FORMAT = 2
"""Version of the folders' layout. Version 1, that of textgym 0.1, had no manifest."""


def _are_files(files: dict[str, Any]) -> bool:
    return all(isinstance(entry, dict) and entry.keys() == {"size", "sha256"} for entry in files.values())


Kind = Annotated[str, Check("a kind of textgym's", lambda kind: kind.startswith("textgym "))]
Files = Annotated[dict[str, Any], Check("sizes and SHA-256 by name", _are_files)]


@dataclass(frozen=True)
class Manifest:
    """What a folder says of itself.

    Attributes:
        kind: what the folder holds, such as "policy".
        format: version of the layout.
        made_by: name of the class that was saved.
        versions: of textgym and torch.
        config: settings as plain values.
        files: size and SHA-256 of every file, by its path in the folder.
    """

    kind: Kind
    format: int
    made_by: str
    versions: dict[str, str]
    config: dict[str, Any] | None
    files: Files = field(repr=False)


def write_manifest(folder: Path, kind: str, made_by: str, config: dict[str, Any] | None = None) -> None:
    """Write the manifest of a folder that is complete otherwise, and that nobody knows by its name yet.

    Args:
        folder: The folder.
        kind: What it holds.
        made_by: Name of the class that is saved.
        config: Its settings.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _measured(path) for path in paths}
    (folder / MANIFEST).write_text(manifest_text(kind, made_by, files, config), encoding="utf-8")


def manifest_text(kind: str, made_by: str, files: Mapping[str, Any], config: dict[str, Any] | None = None) -> str:
    """Return what a manifest says; arguments as of `write_manifest`, and size and SHA-256 of each file."""
    versions = {package: importlib.metadata.version(package) for package in ("textgym", "torch")}
    manifest = Manifest(kind, FORMAT, made_by, versions, config, dict(files))
    return json.dumps(vars(manifest), indent=1) + "\n"


def owned(folder: Path) -> Manifest | None:
    """Return the manifest of a folder that textgym wrote; `None` if it has none, or one of another program."""
    try:
        manifest: Manifest = from_plain(Manifest, json.loads((folder / MANIFEST).read_bytes()), str(folder / MANIFEST))
    except (OSError, ValueError):
        return None
    return manifest


def checked_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """Return the manifest of a folder after comparing every file with it.

    Args:
        folder: the folder.
        kind: what it should hold; `None` for anything.

    Raises:
        DamagedFolderError: the folder is not there, was written by another version, holds something else, or a file is
            missing or not as it was written; the message names it.
    """
    if not folder.is_dir():
        raise DamagedFolderError(f"there is no folder {folder}: give one that was saved")
    if not (folder / MANIFEST).exists():
        raise DamagedFolderError(
            f"{folder} has no {MANIFEST}: it was not written to its end, is no {kind}, or is of textgym 0.1, whose "
            "format 1 is not read any more (its folder policy/ is, as a model)"
        )
    manifest = owned(folder)
    if manifest is None:
        raise DamagedFolderError(f"{folder / MANIFEST} is damaged or no manifest: use another copy of the folder")
    if manifest.format != FORMAT:
        raise DamagedFolderError(
            f"{folder} has format {manifest.format} (textgym {manifest.versions.get('textgym')}), and this version "
            f"reads format {FORMAT}: use that version of textgym"
        )
    if kind is not None and manifest.kind != kind:
        raise DamagedFolderError(f"{folder} holds a {manifest.kind}, not a {kind}")
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    return manifest


def _check_file(folder: Path, name: str, expected: Any) -> None:
    path = folder / name
    if not path.is_file():
        raise DamagedFolderError(f"{path} is missing, and {MANIFEST} names it: use another copy of the folder")
    size = path.stat().st_size
    if size != expected["size"]:
        raise DamagedFolderError(
            f"{path} has {size} bytes instead of the {expected['size']} in {MANIFEST}: it was cut or replaced; use "
            "another copy"
        )
    if _measured(path) != expected:
        raise DamagedFolderError(
            f"{path} is not as it was written (its SHA-256 differs from that in {MANIFEST}): use another copy"
        )


def _measured(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder says of itself in its `run.json`; everything that reads runs asks here first.

    Raises:
        RunFolderError: it holds no run, or one of another version.
    """
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunFolderError(
            f"{folder} is no run folder: it has no {RUN}. Give the folder that was the --output-dir of textgym train"
        ) from error
    except (OSError, ValueError):
        run = None
    if not isinstance(run, dict) or run.get("kind") != RUN_KIND or not isinstance(run.get("format"), int):
        raise RunFolderError(f"{folder} is no run folder: its {RUN} is not textgym's or is damaged. Give another one")
    if run["format"] != FORMAT:
        newer = "update textgym" if run["format"] > FORMAT else "use that version of textgym"
        raise RunFolderError(
            f"{folder} holds a run of format {run['format']}, written by textgym {run.get('textgym')}, and this "
            f"version reads format {FORMAT}: {newer}"
        )
    return run
