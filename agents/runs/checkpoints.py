"""Checkpoints: save an agent at regular intervals, so that a killed run can continue."""

from __future__ import annotations

from pathlib import Path

from textgym.data.files import remove_folder, remove_leftovers
from textgym.models.machine.profiled_phases import phase

from ..common.rollout_agent import Metrics, RolloutAgent
from ..common.supervised import SupervisedAgent
from ..machine.distributed import rank

PREFIX = "step-"


class Checkpoints:
    """Callback of agents that saves them at intervals, in folders such as `step-000123`, and keeps the last few.

    Use it as `agent.learn(4096, callbacks=[Checkpoints("checkpoints")])`. A checkpoint is what `agent.save` writes, so
    `PPO.load(Checkpoints("checkpoints").newest())` continues from the last one. Checkpoints are written under a
    temporary name, flushed to disk and renamed, and old ones are removed afterwards, so that a crash or power cut at
    any moment leaves only complete checkpoints.

    Args:
        folder: Folder for the checkpoints of one run, and for nothing else. With several processes the first one
            writes.
        every: Number of updates between checkpoints.
        keep: Number of checkpoints to keep.

    Raises:
        ValueError: If `every` or `keep` is below 1.
    """

    def __init__(self, folder: str | Path, every: int = 10, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep must be at least 1, got every={every} and keep={keep}")
        self.folder, self.every, self.keep = Path(folder), every, keep

    def __call__(self, agent: RolloutAgent | SupervisedAgent, metrics: Metrics) -> None:
        """Save a checkpoint if it is time; agents call this after each update."""
        if agent.updates % self.every == 0:
            self.save(agent)

    def save(self, agent: RolloutAgent | SupervisedAgent) -> None:
        """Save a checkpoint now, and remove old ones."""
        with phase("checkpoint"):
            agent.save(self.folder / f"{PREFIX}{agent.updates:06d}")
            if rank() == 0:
                self.clean()

    def clean(self) -> None:
        """Remove old checkpoints and incomplete ones of killed processes."""
        for old in self.all()[: -self.keep]:
            remove_folder(old)
        remove_leftovers(self.folder)

    def all(self) -> list[Path]:
        """Return all checkpoints, oldest first; each is complete."""
        return sorted(self.folder.glob(f"{PREFIX}*"), key=self._number)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or `None` if there is none."""
        return max(self.all(), key=self._number, default=None)

    @staticmethod
    def _number(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix(PREFIX))
