"""RunClaim: ownership of a run folder. One process at a time writes there, and it never overwrites other files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from textgym.data.files import atomic_file, remove_folder
from textgym.data.manifests import FORMAT, MANIFEST, RUN, RUN_KIND, owned, read_run
from textgym.errors import RunFolderError
from textgym.viewer.records import records_of

LOCK = "run.lock"
FILES = (
    "config.json",
    "metrics.jsonl",
    "curves.png",
    "samples.md",
    "evaluation.json",
    "heldout_start.json",
    "warnings.jsonl",
    "best/best.json",
    "profile.md",
    "profile.json",
    "trace.json.gz",
)
"""Files that runs write; everything else in a run folder is in a folder with a manifest, or TensorBoard's."""
EVENTS = "tensorboard/events.out.tfevents.*"


class RunClaim:
    """Claims a folder for a run until `release`, or until the process ends, however it ends.

    The folder must be empty or not there, or hold a run of textgym's (it has a `run.json`).

    Args:
        folder: the folder.
        resume: whether to continue the run that is there.
        overwrite: whether it is deleted first. Files that textgym did not write stay.

    Raises:
        RunFolderError: the folder has other files, holds a run that is neither to go on nor to be deleted, or another
            process writes to it.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        check_run_folder(self.folder, resume=resume, overwrite=overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / LOCK, timeout=0)
        try:
            self.lock.acquire()
        except Timeout as error:
            holder = _known(self.folder)
            raise RunFolderError(
                f"{self.folder} is in use by process {holder.get('pid')} on {holder.get('host')}: wait until it "
                "ends, or choose another folder"
            ) from error
        try:
            check_run_folder(self.folder, resume=resume, overwrite=overwrite)  # another process may have been quicker
            if not resume:
                _remove_run(self.folder)
            self._sign()
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other processes have the folder; a second call does nothing."""
        self.lock.release(force=True)

    def finish(self) -> None:
        """Note that the run reached its end; it can still be made longer."""
        self._sign(finished=True)

    def _sign(self, finished: bool = False) -> None:
        earlier = _known(self.folder)
        run = {
            "kind": RUN_KIND,
            "format": FORMAT,
            "id": earlier.get("id") or secrets.token_hex(8),
            "textgym": importlib.metadata.version("textgym"),
            "pid": os.getpid(),
            "host": platform.node(),
            "finished": finished,
        }
        with atomic_file(self.folder / RUN) as temporary:
            temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def check_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a run may use a folder, without writing anything; arguments and errors as `RunClaim`."""
    if resume and overwrite:
        raise RunFolderError("--resume goes on with a run and --overwrite deletes it: give one of them")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: choose another folder for the run")
    names = {path.name for path in folder.iterdir()} - {LOCK}
    if names and RUN not in names:
        raise RunFolderError(
            f"{folder} has files and no {RUN}, so it is no run folder of this version of textgym, and nothing is "
            "written there: choose another folder"
        )
    if names:
        read_run(folder)
    if not (resume or overwrite) and _has_begun(folder):
        raise RunFolderError(
            f"{folder} holds a run already: go on with it (--resume), delete it first (--overwrite), or choose another "
            "folder"
        )


def _known(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its run; nothing if it holds none yet."""
    try:
        return read_run(folder)
    except RunFolderError:
        return {}


def _has_begun(folder: Path) -> bool:
    """Whether there is something to lose: an update's metrics, a checkpoint or a policy."""
    metrics = folder / "metrics.jsonl"
    checkpoints = any(owned(path) for path in folder.glob("checkpoints/*"))
    return checkpoints or (metrics.exists() and metrics.stat().st_size > 0) or owned(folder / "policy") is not None


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in (*(folder / name for name in FILES), *folder.glob(EVENTS), *records_of(folder)):
        path.unlink(missing_ok=True)
    for saved in folder.glob("checkpoints/*"):
        remove_saved(saved)
    for saved in (folder / name for name in ("policy", "reward_model", "viewer", "best/agent")):
        if not _foreign_files(saved):  # else saving the next one replaces textgym's files alone
            remove_saved(saved)
    (folder / RUN).unlink(missing_ok=True)


def remove_saved(folder: Path) -> None:
    """Remove the files of a folder that its manifest names, and the folder if nothing else is in it."""
    manifest = owned(folder)
    if manifest is None:
        return
    if not _foreign_files(folder):
        remove_folder(folder)
        return
    for name in [*manifest.files, MANIFEST]:
        (folder / name).unlink(missing_ok=True)


def _foreign_files(folder: Path) -> bool:
    """Whether a folder has files that its manifest does not name."""
    manifest = owned(folder)
    mine = {MANIFEST, *(manifest.files if manifest is not None else ())}
    return any(path.relative_to(folder).as_posix() not in mine for path in folder.rglob("*") if not path.is_dir())
