"""ReplayBuffer: a replay buffer of whole episodes, whose states share forward passes."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from textgym.models.machine.transfer import to_device
from textgym.models.sequences import HostRows, Sequences

from .means import masked


class ReplayBatch(NamedTuple):
    """B episodes sampled from the replay buffer.

    Attributes:
        sequences: Prompts and responses.
        rewards: `(B, T)`, without the KL penalty.
        reference_log_probs: `(B, T)`, log-probs of the actions under the reference.
        weights: `(B,)`, importance-sampling weights of prioritised replay, at most 1.
        indices: `(B,)`, their indices in the buffer.
    """

    sequences: Sequences
    rewards: Tensor
    reference_log_probs: Tensor
    weights: Tensor
    indices: Tensor

    def part(self, rows: slice) -> ReplayBatch:
        """Return some of the episodes, with the width of the longest."""
        sequences = self.sequences[rows]
        width = sequences.longest
        columns = (self.rewards[rows, :width], self.reference_log_probs[rows, :width])
        return ReplayBatch(sequences, *columns, self.weights[rows], self.indices[rows])


class ReplayBuffer:
    """The newest episodes and their priorities, on the device.

    With `alpha` above 0 the probability of an episode is proportional to priority^alpha, and its weight is
    (probability * number of episodes)^-beta, divided by the largest weight (Schaul et al., 2016). Episodes and not
    transitions have priorities, because a forward pass is for a whole episode. The priority of an episode is 0.9 times
    the largest plus 0.1 times the mean of its absolute TD errors (Kapturowski et al., 2019, R2D2).

    Args:
        capacity: Maximum number of episodes.
        alpha: Exponent of the priorities; 0 samples uniformly.
        beta: Exponent of the importance-sampling weights; 1 corrects the priorities completely.
    """

    def __init__(self, capacity: int, alpha: float = 0.0, beta: float = 0.4) -> None:
        self.capacity, self.alpha, self.beta = capacity, alpha, beta
        self.tensors: dict[str, Tensor] = {}
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @cached_property
    def host(self) -> HostRows:
        """Prompts and lengths on the host; copied once from loaded tensors, and updated by `add` afterwards."""
        tensors = self.tensors
        lengths = tensors["prompt_lengths"], tensors["response_lengths"]
        return HostRows.read(Sequences(tensors["input_ids"], *lengths, generated=tensors["generated"]))

    def add(self, sequences: Sequences, rewards: Tensor, reference_log_probs: Tensor, longest: int) -> None:
        """Add N episodes, which replace the oldest ones and have the largest priority in the buffer.

        Args:
            sequences: The episodes.
            rewards: `(N, T)`.
            reference_log_probs: `(N, T)`.
            longest: Maximum number of tokens of a response.

        Raises:
            ValueError: If there are more episodes than the capacity.
        """
        if len(sequences) > self.capacity:
            raise ValueError(
                f"{len(sequences)} episodes do not fit into a replay buffer of {self.capacity}: set buffer_size to at "
                "least episodes_per_update"
            )
        columns = {
            "input_ids": sequences.input_ids,
            "prompt_lengths": sequences.prompt_lengths,
            "response_lengths": sequences.response_lengths,
            "generated": F.pad(sequences.response_mask, (0, longest - rewards.shape[1])),
            "rewards": F.pad(rewards, (0, longest - rewards.shape[1])),
            "reference_log_probs": F.pad(reference_log_probs, (0, longest - rewards.shape[1])),
        }
        if not self.tensors:
            self.tensors = {name: x.new_zeros(self.capacity, *x.shape[1:]) for name, x in columns.items()}
            self.tensors["priorities"] = rewards.new_zeros(self.capacity)
        highest = self.tensors["priorities"].max() if self.added else 1.0  # so that new episodes are soon replayed
        self.stop, self.decoder_start = sequences.stop, sequences.decoder_start
        slots = torch.arange(self.added, self.added + len(sequences), device=rewards.device) % self.capacity
        for column, new in zip(self.host, sequences.host, strict=True):
            column[np.arange(self.added, self.added + len(sequences)) % self.capacity] = new
        for name, values in columns.items():
            self.tensors[name][slots] = values
        self.tensors["priorities"][slots] = highest
        self.added += len(sequences)

    def sample(self, count: int, generator: torch.Generator) -> ReplayBatch:
        """Sample `count` episodes with replacement; `generator` must be on the CPU."""
        if self.alpha == 0:
            sampled, weights = torch.randint(len(self), (count,), generator=generator), torch.ones(count)
        else:
            odds = self.tensors["priorities"][: len(self)].cpu() ** self.alpha
            sampled = torch.multinomial(odds, count, replacement=True, generator=generator)
            weights = (odds[sampled] / odds.mean()) ** -self.beta  # odds / mean is probability * number of episodes
            weights = weights / weights.max()
        indices, weights = to_device(self.tensors["rewards"].device, sampled, weights)
        host = self.host.take(sampled.numpy())
        widest, longest = int((host.prompt_lengths + host.response_lengths).max()), int(host.response_lengths.max())
        column = {name: values[indices] for name, values in self.tensors.items()}
        replied = (host.num_tokens < host.response_lengths).any()  # the environment, in a game of several turns
        return ReplayBatch(
            Sequences(
                column["input_ids"][:, :widest],
                column["prompt_lengths"],
                column["response_lengths"],
                self.stop,
                column["generated"][:, :longest] if replied else None,
                decoder_start=self.decoder_start,
                known=host,
            ),
            column["rewards"][:, :longest],
            column["reference_log_probs"][:, :longest],
            weights,
            indices,
        )

    def reprioritise(self, indices: Tensor, priorities: Tensor) -> None:
        """Update the priorities of episodes; see `priorities_of`."""
        self.tensors["priorities"][indices] = priorities.to(self.tensors["priorities"].device)


def priorities_of(errors: Tensor, mask: Tensor) -> Tensor:
    """Return the priorities `(B,)` of episodes from the TD errors of their tokens, `(B, T)`."""
    errors = masked(errors.abs(), mask)
    mean = errors.sum(1) / mask.sum(1)
    return 0.9 * errors.amax(1) + 0.1 * mean + 1e-6  # never 0, or an episode could not be sampled again
