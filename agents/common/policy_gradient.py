"""PolicyGradientAgent: what all algorithms that follow a policy gradient share: minibatches and the optimiser step.

An algorithm has its whole update on its own page, `update` and `loss`, and calls from here:

    minibatches   epochs of shuffled minibatches of whole episodes
    step          one optimiser step on `loss`, in micro-batches whose gradients add up to that of the minibatch
    finish        the metrics of an update

Several processes share each minibatch: every one has a part of it, and the gradient is that of the whole.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.machine.finite import check_finite
from textgym.models.machine.transfer import to_host
from textgym.models.sequences import Sequences, on_both
from textgym.settings import Count, NotNegative

from ..machine.distributed import evenly, everyone, share_of, total
from .metrics import TensorMetrics, mean_over, on_host
from .rollout import Rollout
from .rollout_agent import Metrics, RolloutAgent, RolloutAgentConfig


@dataclass
class PolicyGradientConfig(RolloutAgentConfig):
    """Hyperparameters of all policy-gradient agents; the KL's coefficient and estimator are the environment's."""

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


@dataclass(frozen=True)
class Batch:
    """Whole episodes, what was known of their tokens at rollout time, and what they are learned from.

    Attributes:
        sequences: N episodes.
        log_probs: `(N, T)` behaviour log-probs.
        values: `(N, T)` values at rollout time.
        advantages: `(N, T)`.
        returns: `(N, T)`; zero where an algorithm has no critic.
        indices: `(N,)`, which rows of the rollout they are.
        with_gradient: bool `(N,)` on the host: the episodes whose loss has a gradient. The others count in its mean and
            cost no pass. `None` if all have one.
        spare: the episodes weigh nothing: this process has none left, and keeps the others company, see `evenly`.
    """

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    indices: Tensor
    with_gradient: Tensor | None = None
    spare: bool = False

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, chosen: slice | Tensor) -> Batch:
        """Return some of the episodes, as wide as the longest of them; indices are on the host."""
        rows, host_rows = on_both(chosen, self.indices.device)
        sequences = self.sequences.take(rows, host_rows)
        width = sequences.longest
        columns = (self.log_probs, self.values, self.advantages, self.returns)
        log_probs, values, advantages, returns = (x[rows, :width] for x in columns)
        with_gradient = None if self.with_gradient is None else self.with_gradient[host_rows]
        return Batch(sequences, log_probs, values, advantages, returns, self.indices[rows], with_gradient, self.spare)

    def trained(self) -> Batch:
        """Return the episodes whose loss has a gradient; where there is none, a spare one."""
        if self.with_gradient is None:
            return self
        rows = self.with_gradient.nonzero()[:, 0]
        return self[rows] if len(rows) else replace(self[slice(0, 1)], spare=True)

    @property
    def response_mask(self) -> Tensor:
        """Response mask, bool `(N, T)`: the tokens that the policy generated."""
        return self.sequences.response_mask


class PolicyGradientAgent(RolloutAgent):
    """Base class of policy-gradient agents; arguments as `RolloutAgent`. An algorithm has `update` and `loss`."""

    config: PolicyGradientConfig

    @abstractmethod
    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return the loss to minimise of a batch, and metrics to report. Both are means, see `weight`.

        Args:
            new: the batch under the policy that is trained, with gradients.
            batch: the same tokens at rollout time.
        """

    def weight(self, batch: Batch) -> int:
        """Return what a batch's mean weighs in the mean of several: its tokens, if the loss is a mean over tokens."""
        return batch.sequences.num_tokens

    def evaluate(self, policy: ActorCritic, batch: Batch) -> Evaluation:
        """Score a batch with a policy, with gradients."""
        with torch.autocast(batch.advantages.device.type, torch.bfloat16, enabled=self.config.bf16):
            return policy.evaluate(batch.sequences, entropy_gradient=self.config.entropy_coef != 0)

    def minibatches(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor | None = None,
        rows: Tensor | None = None,
        with_gradient: Tensor | None = None,
    ) -> Iterator[Batch]:
        """Yield every minibatch of every epoch; an epoch has each episode once, in a new order.

        Args:
            rollout: the episodes.
            advantages: `(N, T)`.
            returns: `(N, T)`, what a critic learns.
            rows: on the host, the episodes that are trained on; `None` for all that have a score.
            with_gradient: see `Batch`.
        """
        returns = torch.zeros_like(advantages) if returns is None else returns
        indices = torch.arange(len(rollout), device=advantages.device)
        batch = Batch(rollout.sequences, rollout.log_probs, rollout.values, advantages, returns, indices, with_gradient)
        if rows is None:
            [scored] = to_host(rollout.scored)
            rows = scored.nonzero()[:, 0]
        size = share_of(self.config.minibatch_size, "minibatch_size") if self.config.minibatch_size else None
        for _ in range(self.config.num_epochs):
            order = rows[torch.randperm(len(rows), generator=self.shuffler)]
            shuffled = batch[order] if len(order) else batch
            for chosen, counts in evenly(_slices(len(order), size), spare=slice(0, 1)):
                yield replace(shuffled[chosen], spare=not counts)

    def step(self, batch: Batch) -> TensorMetrics:
        """Make one optimiser step on `loss`; the batch is that of all processes, of which each has a part.

        Returns:
            the metrics of `loss`, means over the episodes whose loss has a gradient, and the gradient's norm.

        Raises:
            NonFiniteError: the loss or the norm is NaN or infinite; the weights stay as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        trained = batch.trained()
        weights = [0 if each.spare else self.weight(each) for each in (batch, trained)]
        whole, of_trained = (max(sum(column), 1) for column in zip(*everyone(weights), strict=True))
        metrics: TensorMetrics = {}
        # Micro-batches: each backward pass adds its share of the batch's gradient.
        for rows, counts in evenly(_slices(len(trained), self.config.micro_batch_size), spare=slice(0, 1)):
            part = trained if rows.stop - rows.start == len(trained) else trained[rows]
            weight = self.weight(part) if counts and not trained.spare else 0
            loss, reported = self.loss(self.learner(functools.partial(self.evaluate, batch=part)), part)
            (loss * (weight / whole)).backward()
            for name, value in {**reported, "loss": loss}.items():
                metrics[name] = metrics.get(name, 0.0) + weight / of_trained * value.detach().double()
        metrics = dict(zip(metrics, total(torch.stack(list(metrics.values()))), strict=True))
        check_finite("loss", metrics.pop("loss"), f"update {self.updates + 1}")
        metrics["val/grad_norm"] = self.apply_gradients()
        return metrics

    def finish(self, steps: list[TensorMetrics], further: TensorMetrics | None = None) -> Metrics:
        """Bring the policy up to date with what was trained, and return the metrics of an update.

        Args:
            steps: metrics of each step, which are averaged.
            further: metrics of the update.
        """
        self.learner.refresh()
        return on_host(mean_over(steps) | (further or {}))


def _slices(count: int, size: int | None) -> list[slice]:
    """Split so many rows into parts of a size; `None`: into one."""
    size = size or max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
