"""SurrogateAgent: what every agent that ascends a surrogate of the policy gradient shares.

One update:
    1. Price every token: reward - beta KL(pi, pi_ref), the score on the last token.
    2. Advantages, by the algorithm's own estimator.
    3. Epochs of minibatches of whole episodes: the algorithm's own loss, one optimiser step each.
An algorithm is a subclass with `advantages` and `loss`.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.sequences import Sequences, on_both
from textgym.settings import Count, NotNegative

from ..machine.distributed import evenly, everyone, share_of, total
from .advantages import overall_mean
from .metrics import Figures, mean_over, on_host
from .on_policy import Metrics, OnPolicyAgent, OnPolicyConfig
from .rollout import Rollout


@dataclass
class SurrogateConfig(OnPolicyConfig):
    """What every surrogate agent can be told; the KL's coefficient and estimator are the environment's."""

    num_epochs: Count = 1
    """Passes over each rollout."""
    minibatch_size: Count | None = None
    """Episodes in a minibatch, over all processes; None takes all of them at once."""
    micro_batch_size: Count | None = None
    """Episodes in one forward pass; gradients add up to exactly those of the minibatch. None: the whole minibatch."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: NotNegative | None = None
    """Ends an update's epochs when the approximate KL to the old policy, per token, exceeds 1.5 times this."""


class Targets(NamedTuple):
    """What a rollout is learned from: advantages `(N, T)`, and returns `(N, T)` for the critic if there is one."""

    advantages: Tensor
    returns: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Whole episodes, what was known of their tokens when they were sampled, and what they are learned from.

    Attributes:
        sequences: N episodes.
        log_probs: `(N, T)` behaviour log-probs.
        values: `(N, T)` values of then.
        advantages: `(N, T)`.
        returns: `(N, T)`.
        indices: `(N,)`, which rows of the rollout they are.
    """

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, chosen: slice | Tensor) -> Batch:
        """Some of the episodes, as wide as the longest of them; indices are on the host."""
        rows, host_rows = on_both(chosen, self.indices.device)
        sequences = self.sequences.take(rows, host_rows)
        width = sequences.longest
        columns = (self.log_probs, self.values, self.advantages, self.returns)
        log_probs, values, advantages, returns = (x[rows, :width] for x in columns)
        return Batch(sequences, log_probs, values, advantages, returns, self.indices[rows])

    @property
    def mask(self) -> Tensor:
        """Bool `(N, T)`: the real response tokens."""
        return self.sequences.mask


class SurrogateAgent(OnPolicyAgent):
    """See the module's text; arguments as `OnPolicyAgent`."""

    config: SurrogateConfig

    def price(self, rollout: Rollout, kl: Tensor) -> Tensor:
        """Token rewards `(N, T)`, the KL penalty taken off."""
        return self.penalty.charge(rollout.rewards(), kl)

    @abstractmethod
    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """Targets from a rollout and its token rewards `(N, T)`, the KL penalty taken off."""

    @abstractmethod
    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise of a batch, and figures to report. Both are means, see `weight`."""

    def weight(self, batch: Batch) -> int:
        """What a batch's mean weighs in the mean of several: its tokens, since losses are means over tokens."""
        return batch.sequences.num_tokens

    def usable(self) -> Tensor | None:
        """Indices of the episodes worth training on, on the host; `None` for all."""
        return None

    def figures(self) -> Figures:
        """What an update reports besides the figures of `loss`; most have nothing."""
        return {}

    def evaluate(self, policy: ActorCritic, batch: Batch) -> Evaluation:
        """A policy on a batch, with gradients."""
        with torch.autocast(batch.advantages.device.type, torch.bfloat16, enabled=self.config.bf16):
            return policy.evaluate(batch.sequences, entropy_gradient=self.config.entropy_coef != 0)

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Steps 1 to 3 of the module's text."""
        rewards = self.price(rollout, kl)  # (N, T)
        targets = self.advantages(rollout, rewards)
        returns = torch.zeros_like(rewards) if targets.returns is None else targets.returns
        indices = torch.arange(len(rollout), device=rewards.device)
        batch = Batch(rollout.sequences, rollout.log_probs, rollout.values, targets.advantages, returns, indices)
        steps: list[Figures] = []
        for minibatch, counts in self._minibatches(batch):
            steps.append(self._learn_from(minibatch, counts))
            if self.config.target_kl is not None:  # the one thing that the host waits for in every minibatch
                approximate = steps[-1].get("policy/approxkl_avg", 0.0)
                if float(approximate) > 1.5 * self.config.target_kl:
                    break
        self.learner.refresh()
        figures = mean_over(steps) | self.figures()
        if targets.returns is not None:
            figures |= _explained(batch)
        return on_host(figures)

    def _learn_from(self, batch: Batch, counts: bool) -> Figures:
        """One optimiser step; in micro-batches, whose gradients add up to that of the batch.

        The batch is that of all processes, of which each has a part; `counts` says whether this one's does.
        """
        self.optimizer.zero_grad(set_to_none=True)
        whole = sum(everyone(self.weight(batch) * counts))
        figures: Figures = {}
        for rows, real in evenly(_slices(len(batch), self.config.micro_batch_size), spare=slice(0, 1)):
            part = batch if rows.stop - rows.start == len(batch) else batch[rows]
            share = self.weight(part) / whole if counts and real else 0.0
            loss, minibatch = self.loss(self.learner(functools.partial(self.evaluate, batch=part)), part)
            (loss * share).backward()
            for name, figure in minibatch.items():
                figures[name] = figures.get(name, 0.0) + share * figure.detach().double()
        shares = total(torch.stack(list(figures.values())))
        return {**dict(zip(figures, shares, strict=True)), "val/grad_norm": self.apply_gradients()}

    def _minibatches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """Every minibatch of every epoch, and whether it counts, see `evenly`.

        Each epoch sees each usable episode once, in a new order.
        """
        usable = self.usable()
        rows = torch.arange(len(batch)) if usable is None else usable
        size = share_of(self.config.minibatch_size, "minibatch_size") if self.config.minibatch_size else None
        for _ in range(self.config.num_epochs):
            order = rows[torch.randperm(len(rows), generator=self.shuffler)]
            shuffled = batch[order] if len(order) else batch
            for chosen, counts in evenly(_slices(len(order), size), spare=slice(0, 1)):
                yield shuffled[chosen], counts


def _slices(count: int, size: int | None) -> list[slice]:
    """So many rows in parts of a size; `None`: in one."""
    size = size or max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _explained(batch: Batch) -> Figures:
    mask, returns = batch.mask, batch.returns
    error = overall_mean((returns - batch.values).square(), mask)
    variance = overall_mean((returns - overall_mean(returns, mask)).square(), mask)
    return {"val/explained_variance": 1 - error / variance.clamp(min=1e-8)}
