"""Checkpoints: save an agent at regular intervals, so that a killed run can continue."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from textgym.data.files import remove_leftovers
from textgym.data.manifests import checked_manifest, owned
from textgym.errors import DamagedFolderError
from textgym.models.machine.profiled_phases import phase
from textgym.settings import Count, check_arguments

from ..common.rollout_agent import Metrics, RolloutAgent
from ..common.saving import AGENT
from ..common.supervised import SupervisedAgent
from ..machine.distributed import rank
from .claims import remove_saved

PREFIX = "step-"


class Checkpoints:
    """Callback of agents that saves them at intervals, in folders such as `step-000123`, and keeps the last few.

    Use it as `agent.learn(4096, callback=[Checkpoints("checkpoints")])`; `save(agent)` before it makes a run
    resumable from its first update. A checkpoint is what `agent.save` writes, so
    `PPO.load(Checkpoints("checkpoints").newest())` continues from the last one. Checkpoints are written under a
    temporary name, flushed to disk and renamed, and old ones are removed afterwards, so that a crash or power cut at
    any moment leaves only complete checkpoints.

    Args:
        folder: Folder for the checkpoints of one run, and for nothing else. With several processes the first one
            writes.
        every: Number of updates between checkpoints.
        keep: Number of checkpoints to keep.

    Raises:
        ConfigError: If `every` or `keep` is below 1.
    """

    @check_arguments
    def __init__(self, folder: str | Path, every: Count = 10, keep: Count = 2) -> None:
        self.folder, self.every, self.keep = Path(folder), every, keep

    def __call__(self, agent: RolloutAgent | SupervisedAgent, metrics: Metrics) -> None:
        """Save a checkpoint if it is time; agents call this after each update."""
        if agent.updates % self.every == 0:
            self.save(agent)

    def finish(self, agent: RolloutAgent | SupervisedAgent) -> None:
        """Save a checkpoint of the last update, unless there is one: a longer run continues from there."""
        if agent.updates % self.every != 0:
            self.save(agent)

    def save(self, agent: RolloutAgent | SupervisedAgent) -> None:
        """Save a checkpoint now, and remove old ones."""
        with phase("checkpoint"):
            # One of the same number is from before this run went back to an older one.
            agent.save(self.folder / f"{PREFIX}{agent.updates:06d}", overwrite=True)
            if rank() == 0:
                self.clean()

    def clean(self) -> None:
        """Remove old checkpoints and incomplete ones of killed processes."""
        for old in [path for path in self.all() if owned(path)][: -self.keep]:
            remove_saved(old)
        remove_leftovers(self.folder)

    def all(self) -> list[Path]:
        """Return all checkpoints, oldest first; each was written to its end."""
        found = [path for path in self.folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
        return sorted(found, key=self._number)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or `None` if there is none."""
        return max(self.all(), key=self._number, default=None)

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that is as it was written, or `None` if there is none.

        Damaged ones that are newer are renamed to `damaged-...`, with a warning that names the file.

        Raises:
            DamagedFolderError: If there are checkpoints, and all are damaged.
        """
        problems = []
        for path in reversed(self.all()):
            try:
                checked_manifest(path, AGENT)
            except DamagedFolderError as error:
                problems.append((path, error))
                continue
            for damaged, problem in problems:
                aside = damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
                warnings.warn(f"{problem}. It is now {aside.name}, and the run goes on from {path}", stacklevel=2)
            return path
        if problems:
            raise DamagedFolderError(f"all checkpoints in {self.folder} are damaged: {problems[0][1]}")
        return None

    @staticmethod
    def _number(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix(PREFIX))
