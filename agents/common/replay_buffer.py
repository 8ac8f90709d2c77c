"""ReplayBuffer: the replay memory: whole episodes, whose states share passes."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from textgym.models.machine.transfer import to_device
from textgym.models.sequences import HostRows, Sequences


class ReplayBatch(NamedTuple):
    """B episodes drawn from memory.

    Attributes:
        sequences: prompts and responses.
        rewards: `(B, T)`, without the KL.
        reference_log_probs: `(B, T)`, of the actions.
        weights: `(B,)`, what makes up for episodes that are drawn more often than others, at most 1.
        indices: `(B,)`, where they are.
    """

    sequences: Sequences
    rewards: Tensor
    reference_log_probs: Tensor
    weights: Tensor
    indices: Tensor

    def part(self, rows: slice) -> ReplayBatch:
        """Some of the episodes, as wide as the longest of them."""
        sequences = self.sequences[rows]
        width = sequences.longest
        columns = (self.rewards[rows, :width], self.reference_log_probs[rows, :width])
        return ReplayBatch(sequences, *columns, self.weights[rows], self.indices[rows])


class ReplayBuffer:
    """The newest episodes, on the device, and their priorities.

    With `alpha` above 0 an episode is drawn with a probability in proportion to priority^alpha, and weighted by
    (probability times number of episodes)^-beta (Schaul et al., 2016). Episodes and not transitions have priorities,
    since it is episodes that take passes; an episode's is 0.9 of its largest and 0.1 of its mean error (Kapturowski et
    al., 2019, R2D2).

    Args:
        capacity: episodes that are kept.
        alpha: 0 draws all alike.
        beta: 1 makes up for the priorities in full; it stays as it is, and is not annealed.
    """

    def __init__(self, capacity: int, alpha: float = 0.0, beta: float = 0.6) -> None:
        self.capacity, self.alpha, self.beta = capacity, alpha, beta
        self.tensors: dict[str, Tensor] = {}
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @cached_property
    def host(self) -> HostRows:
        """What the host knows of all episodes; read once from tensors that were loaded, and kept up from then on."""
        tensors = self.tensors
        return HostRows.read(Sequences(tensors["input_ids"], tensors["prompt_lengths"], tensors["response_lengths"]))

    def add(self, sequences: Sequences, rewards: Tensor, reference_log_probs: Tensor, longest: int) -> None:
        """Keeps N episodes in place of the oldest ones; new ones are as urgent as the most urgent one.

        Args:
            sequences: the episodes.
            rewards: `(N, T)`.
            reference_log_probs: `(N, T)`.
            longest: the most tokens that a response can have.

        Raises:
            ValueError: more episodes than there is room for, or such as the environment wrote in too, whose tokens
                returns over n steps would count.
        """
        if sequences.generated is not None:
            raise ValueError("off-policy agents play no games of several turns yet: use an on-policy one, such as PPO")
        if len(sequences) > self.capacity:
            raise ValueError(
                f"{len(sequences)} episodes do not fit into a memory of {self.capacity}: set buffer_size to at least "
                "episodes_per_update"
            )
        columns = {
            "input_ids": sequences.input_ids,
            "prompt_lengths": sequences.prompt_lengths,
            "response_lengths": sequences.response_lengths,
            "rewards": F.pad(rewards, (0, longest - rewards.shape[1])),
            "reference_log_probs": F.pad(reference_log_probs, (0, longest - rewards.shape[1])),
        }
        if not self.tensors:
            self.tensors = {name: x.new_zeros(self.capacity, *x.shape[1:]) for name, x in columns.items()}
            self.tensors["priorities"] = rewards.new_zeros(self.capacity)
        urgent = self.tensors["priorities"].max() if self.added else 1.0
        self.stop, self.decoder_start = sequences.stop, sequences.decoder_start
        slots = torch.arange(self.added, self.added + len(sequences), device=rewards.device) % self.capacity
        for kept, new in zip(self.host, sequences.host, strict=True):
            kept[np.arange(self.added, self.added + len(sequences)) % self.capacity] = new
        for name, values in columns.items():
            self.tensors[name][slots] = values
        self.tensors["priorities"][slots] = urgent
        self.added += len(sequences)

    def sample(self, count: int, generator: torch.Generator) -> ReplayBatch:
        """Draws `count` episodes, with replacement; `generator` is a CPU's."""
        if self.alpha == 0:
            drawn, weights = torch.randint(len(self), (count,), generator=generator), torch.ones(count)
        else:
            odds = self.tensors["priorities"][: len(self)].cpu() ** self.alpha
            drawn = torch.multinomial(odds, count, replacement=True, generator=generator)
            weights = (odds[drawn] / odds.mean()) ** -self.beta
            weights = weights / weights.max()
        indices, weights = to_device(self.tensors["rewards"].device, drawn, weights)
        host = self.host.take(drawn.numpy())
        widest, longest = int((host.prompt_lengths + host.response_lengths).max()), int(host.response_lengths.max())
        column = {name: values[indices] for name, values in self.tensors.items()}
        return ReplayBatch(
            Sequences(
                column["input_ids"][:, :widest],
                column["prompt_lengths"],
                column["response_lengths"],
                self.stop,
                decoder_start=self.decoder_start,
                known=host,
            ),
            column["rewards"][:, :longest],
            column["reference_log_probs"][:, :longest],
            weights,
            indices,
        )

    def reprioritise(self, indices: Tensor, errors: Tensor, mask: Tensor) -> None:
        """Sets the priorities of episodes from the errors of their tokens, `(B, T)`."""
        errors = torch.where(mask, errors.abs(), 0.0)
        mean = errors.sum(1) / mask.sum(1)
        self.tensors["priorities"][indices] = 0.9 * errors.amax(1) + 0.1 * mean + 1e-6
