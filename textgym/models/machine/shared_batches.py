"""The batches of an epoch, shared by the processes of a run, for SFT, DPO and reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler


class Order(Protocol):
    """The order of the items in each epoch, the same in all processes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""


class Shuffled(Sampler[int]):
    """A random order of items, another one in each epoch.

    Args:
        num_items: Number of items.
        seed: Seed of the order.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items, self.seed, self.epoch = num_items, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.num_items, generator=generator).tolist()


class SharedBatches(Sampler[list[int]]):
    """Micro-batches of one process; those of all processes together have each item once an epoch.

    The order of an epoch is cut into batches of one update each, a batch into parts, and a part is dealt out to the
    processes. So an update trains on the same items however many processes there are. All processes have the same
    number of micro-batches, because their passes are collective operations. Where items run out, in the last update of
    an epoch, some are empty.

    accelerate would instead repeat items of the first batch until all processes have the same number.

    Args:
        order: The order of the items.
        batch_size: Items in one update, over all processes.
        micro_batch_size: Most items in one micro-batch; `None` for no limit.
        processes: Number of processes.
        process: Rank of this process.

    >>> for process in range(2):
    ...     print(list(SharedBatches(range(5), batch_size=4, micro_batch_size=2, processes=2, process=process)))
    [[0, 2], [4]]
    [[1, 3], []]
    """

    def __init__(
        self, order: Order, batch_size: int, micro_batch_size: int | None, processes: int, process: int
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.part = min(micro_batch_size or batch_size, batch_size) * processes
        self.processes, self.process = processes, process

    @property
    def parts_per_batch(self) -> int:
        """Number of micro-batches of this process in one update; the last one of an epoch may have fewer."""
        return -(-self.batch_size // self.part)

    def epochs(self, updates: int) -> float:
        """Return how many times the items have been trained on after so many updates."""
        whole, rest = divmod(updates, -(-len(self.order) // self.batch_size))
        return whole + min(rest * self.batch_size / len(self.order), 1.0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size)
        return whole * self.parts_per_batch + -(-rest // self.part)

    def __iter__(self) -> Iterator[list[int]]:
        items = list(self.order)
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            for first in range(0, len(batch), self.part):
                yield batch[first : first + self.part][self.process :: self.processes]


class SharedLoader(DataLoader[Any]):
    """Loader of the micro-batches of this process, for `transformers.Trainer`.

    An empty micro-batch is a batch of the first item whose `"counts"` is 0: its loss must be multiplied by it.

    Args:
        batches: The micro-batches.
        collate: Function from items to a batch, a dict.
    """

    def __init__(self, batches: SharedBatches, collate: Callable[[Sequence[int]], dict[str, Any]]) -> None:
        def counted(items: list[int]) -> dict[str, Any]:
            return {**collate(items or [0]), "counts": torch.tensor(float(bool(items)))}

        super().__init__(range(len(batches.order)), batch_sampler=batches, collate_fn=counted)  # type: ignore[arg-type]
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the trainer calls it."""
        self.batches.set_epoch(epoch)
