"""Checkpoints: an agent's state on the disk after every so many updates, from which a killed run goes on."""

from __future__ import annotations

from pathlib import Path

from textgym.data.files import remove_folder, remove_leftovers
from textgym.models.machine.profiled_phases import phase

from ..common.rollout_agent import Metrics, RolloutAgent
from ..common.supervised import SupervisedAgent
from ..machine.distributed import rank

PREFIX = "step-"


class Checkpoints:
    """Saves an agent after every so many updates as `step-000123`, named by its updates; the last few are kept.

    It is a callback of agents: `agent.learn(4096, callbacks=[Checkpoints("checkpoints")])`. What is written is what
    `agent.save` writes, so `PPO.load(Checkpoints("checkpoints").newest())` goes on from it. A
    checkpoint is written under a temporary name, put on the disk and renamed, and the oldest is removed afterwards:
    kill -9 or a power cut at any moment leaves whole checkpoints only.

    Args:
        folder: of the checkpoints, and of nothing else; one run writes there, its first process for all of them.
        every: updates from one checkpoint to the next.
        keep: how many stay.

    Raises:
        ValueError: `every` or `keep` below 1.
    """

    def __init__(self, folder: str | Path, every: int = 10, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep must be at least 1, got every={every} and keep={keep}")
        self.folder, self.every, self.keep = Path(folder), every, keep

    def __call__(self, agent: RolloutAgent | SupervisedAgent, metrics: Metrics) -> None:
        """Called by agents after each update."""
        if agent.updates % self.every == 0:
            self.save(agent)

    def save(self, agent: RolloutAgent | SupervisedAgent) -> None:
        """Writes a checkpoint now, and removes the oldest ones."""
        with phase("checkpoint"):
            agent.save(self.folder / f"{PREFIX}{agent.updates:06d}")
            if rank() == 0:
                self.clean()

    def clean(self) -> None:
        """Removes the oldest checkpoints, and what a process that was killed left half-written."""
        for old in self.all()[: -self.keep]:
            remove_folder(old)
        remove_leftovers(self.folder)

    def all(self) -> list[Path]:
        """The checkpoints there are, oldest first; every one is complete."""
        return sorted(self.folder.glob(f"{PREFIX}*"), key=self._number)

    def newest(self) -> Path | None:
        """Where to go on from; `None` if there is no checkpoint yet."""
        return max(self.all(), key=self._number, default=None)

    @staticmethod
    def _number(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix(PREFIX))
