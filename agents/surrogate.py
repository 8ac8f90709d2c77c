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
from textgym.models.sequences import Sequences

from .advantages import overall_mean
from .distributed import evenly, everyone, share_of, total
from .on_policy import Metrics, OnPolicyAgent, OnPolicyConfig
from .rollout import Rollout


@dataclass
class SurrogateConfig(OnPolicyConfig):
    """What every surrogate agent can be told; the KL's coefficient and estimator are the environment's."""

    num_epochs: int = 1
    """Passes over each rollout."""
    minibatch_size: int | None = None
    """Episodes in a minibatch, over all processes; None takes all of them at once."""
    micro_batch_size: int | None = None
    """Episodes in one forward pass; gradients add up to exactly those of the minibatch. None: the whole minibatch."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float | None = None
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

    def __getitem__(self, rows: Tensor) -> Batch:
        """Some of the episodes, as wide as the longest of them."""
        sequences = self.sequences[rows]
        width = sequences.mask.shape[1]
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
        return rollout.rewards() - self.penalty.price(kl)

    @abstractmethod
    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """Targets from a rollout and its token rewards `(N, T)`, the KL penalty taken off."""

    @abstractmethod
    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise of a batch, and figures to report. Both are means, see `weight`."""

    def weight(self, batch: Batch) -> int:
        """What a batch's mean weighs in the mean of several: its tokens, since losses are means over tokens."""
        return int(batch.mask.sum())

    def usable(self) -> Tensor | None:
        """Indices of the episodes worth training on; `None` for all."""
        return None

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
        figures: list[Metrics] = []
        for rows, counts in self._minibatches(len(rollout), self.usable()):
            figures.append(self._learn_from(batch[rows], counts))
            approximate = figures[-1].get("policy/approxkl_avg", 0.0)
            if self.config.target_kl is not None and approximate > 1.5 * self.config.target_kl:
                break
        self.learner.refresh()
        means = {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]} if figures else {}
        return {**means, **({} if targets.returns is None else _explained(batch))}

    def _learn_from(self, batch: Batch, counts: bool) -> Metrics:
        """One optimiser step; in micro-batches, whose gradients add up to that of the batch (trap 24).

        The batch is that of all processes, of which each has a part; `counts` says whether this one's does.
        """
        self.optimizer.zero_grad(set_to_none=True)
        whole = sum(everyone(self.weight(batch) * counts))
        figures: Metrics = {}
        parts = torch.arange(len(batch)).split(self.config.micro_batch_size or len(batch))
        for rows, real in evenly(parts, spare=parts[0][:1]):
            part = batch[rows] if len(rows) < len(batch) else batch
            share = self.weight(part) / whole if counts and real else 0.0
            loss, minibatch = self.loss(self.learner(functools.partial(self.evaluate, batch=part)), part)
            (loss * share).backward()
            for name, figure in minibatch.items():
                figures[name] = figures.get(name, 0.0) + share * float(figure.detach())
        shares = total(torch.tensor(list(figures.values()), dtype=torch.float64, device=self.policy.device))
        return {**dict(zip(figures, shares.tolist(), strict=True)), "val/grad_norm": self.apply_gradients()}

    def _minibatches(self, count: int, usable: Tensor | None) -> Iterator[tuple[Tensor, bool]]:
        """Row indices of every minibatch of every epoch, and whether they count, see `evenly`.

        Each epoch sees each episode once, in a new order.
        """
        rows = torch.arange(count, device=self.policy.device) if usable is None else usable
        size = share_of(self.config.minibatch_size, "minibatch_size") if self.config.minibatch_size else count
        for _ in range(self.config.num_epochs):
            order = torch.randperm(len(rows), generator=self.shuffler).to(rows.device)
            yield from evenly(rows[order].split(size) if len(rows) else (), spare=rows.new_zeros(1))


def _explained(batch: Batch) -> Metrics:
    mask, returns = batch.mask, batch.returns
    error = overall_mean((returns - batch.values).square(), mask)
    variance = overall_mean((returns - overall_mean(returns, mask)).square(), mask)
    return {"val/explained_variance": float(1 - error / variance.clamp(min=1e-8))}
