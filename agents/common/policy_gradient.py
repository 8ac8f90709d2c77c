"""PolicyGradientAgent: base class of policy-gradient algorithms, with minibatches and the optimiser step.

The file of an algorithm has its update, `update` and `loss`, and calls these methods:

    minibatches   epochs of shuffled minibatches of whole episodes
    step          one optimiser step on `loss`, in micro-batches whose gradients add up to that of the minibatch
    finish        the metrics of an update

In a run of several processes each trains on a part of every minibatch, and the gradient is that of the whole minibatch.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic, Evaluation, PolicyLike
from textgym.models.machine.transfer import to_host
from textgym.models.sequences import Sequences, on_both
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import compared_with_others, estimate_kl, kl_to_go, sequence_kl

from ..configs.policy_gradient import KLInLoss, PolicyGradientConfig
from ..machine.distributed import count, everyone, pad_micro_batches, rank, sum_over_processes
from .advantages import leave_one_out_mean, own_steps
from .constraints import Constraints
from .means import masked, overall_mean
from .metrics import TensorMetrics, mean_over, on_host
from .rollout import Rollout
from .rollout_agent import Metrics, RolloutAgent

COLUMNS = ("log_probs", "values", "advantages", "returns", "reference_log_probs", "later_kl")
"""Names of the tensors `(N, T)` of a batch."""


@dataclass(frozen=True)
class Batch:
    """Whole episodes with log-probs and values at rollout time, and with advantages and returns.

    Attributes:
        sequences: N episodes.
        log_probs: `(N, T)`, log-probs at rollout time.
        values: `(N, T)`, values at rollout time.
        advantages: `(N, T)`.
        returns: `(N, T)`, targets of the critic; zero for algorithms without one.
        indices: `(N,)`, indices of the episodes among those of all processes.
        with_gradient: Bool `(N,)` on the host: the episodes whose loss has a gradient. The others count in the mean but
            need no forward pass. `None` if all have a gradient.
        reference_log_probs: `(N, T)`, log-probs under the reference, if the loss has the KL.
        later_kl: `(N, T)`, the KL after each token, if the loss has the KL of whole texts.
        spare: Whether the episodes have weight 0. They then stand in for a process without episodes, which must take
            part in collective operations; see `textgym.agents.machine.distributed.pad_micro_batches`.
    """

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    indices: Tensor
    with_gradient: Tensor | None = None
    reference_log_probs: Tensor | None = None
    later_kl: Tensor | None = None
    spare: bool = False

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, chosen: slice | Tensor) -> Batch:
        """Return some of the episodes, with the width of the longest; indices are on the host."""
        rows, host_rows = on_both(chosen, self.indices.device)
        sequences = self.sequences.take(rows, host_rows)
        width = sequences.longest
        columns: Any = {name: x[rows, :width] for name in COLUMNS if (x := getattr(self, name)) is not None}
        with_gradient = None if self.with_gradient is None else self.with_gradient[host_rows]
        return replace(self, sequences=sequences, indices=self.indices[rows], with_gradient=with_gradient, **columns)

    def to(self, device: torch.device) -> Batch:
        """Return the episodes on a device."""
        columns: Any = {name: x.to(device) for name in COLUMNS if (x := getattr(self, name)) is not None}
        return replace(self, sequences=self.sequences.to(device), indices=self.indices.to(device), **columns)

    @classmethod
    def cat(cls, parts: Sequence[Batch]) -> Batch:
        """Concatenate batches with the same columns, padded to the longest response."""
        longest = max(part.sequences.longest for part in parts)

        def padded(name: str) -> Tensor | None:
            columns = [getattr(part, name) for part in parts]
            return None if columns[0] is None else torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in columns])

        columns: Any = {name: padded(name) for name in COLUMNS}
        masks = [part.with_gradient for part in parts if part.with_gradient is not None]
        return replace(
            parts[0],
            sequences=Sequences.cat([part.sequences for part in parts]),
            indices=torch.cat([part.indices for part in parts]),
            with_gradient=torch.cat(masks) if masks else None,
            **columns,
        )

    def trained(self) -> Batch:
        """Return the episodes whose loss has a gradient; if there are none, a spare one."""
        if self.with_gradient is None:
            return self
        rows = self.with_gradient.nonzero()[:, 0]
        return self[rows] if len(rows) else replace(self[slice(0, 1)], spare=True)

    @property
    def response_mask(self) -> Tensor:
        """Response mask, bool `(N, T)`: the tokens that the policy generated."""
        return self.sequences.response_mask


class PolicyGradientAgent(RolloutAgent):
    """Base class of policy-gradient agents, which implement `update` and `loss`; arguments as `RolloutAgent`."""

    config: PolicyGradientConfig
    advantages: Tensor | None = None
    """`(N, T)`, of the last update, for callbacks that show them."""
    returns: Tensor | None = None
    """`(N, T)`, targets of the critic in the last update; `None` for algorithms without one."""
    reference_log_probs: Tensor | None = None  # (N, T) of the rollout, if the loss has the KL
    later_kl: Tensor | None = None  # (N, T) of the rollout, if the loss has the KL of whole texts

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        limits = self.config.constraints
        self.constraints = Constraints(limits, self.config.constraint_learning_rate, self.base_env.scorer.names)
        self.averaged = None if self.config.ema_decay is None else self.policy.frozen_copy()

    @abstractmethod
    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return the loss of a batch, and metrics. Both are means with the weight that `weight` returns.

        Args:
            new: Log-probs, values and entropies of the current policy, with gradients.
            batch: The same tokens at rollout time.
        """

    def weight(self, batch: Batch) -> int:
        """Return the weight of a batch in the mean of several: its number of tokens, if the loss is a token mean."""
        return batch.sequences.num_tokens

    def evaluate(self, policy: ActorCritic, batch: Batch) -> Evaluation:
        """Evaluate a batch with a policy, with gradients."""
        with torch.autocast(batch.advantages.device.type, torch.bfloat16, enabled=self.config.bf16):
            reference = None if self.later_kl is None else self.penalty.reference
            return policy.evaluate(batch.sequences, self.config.entropy_coef != 0, reference)

    def minibatches(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor | None = None,
        rows: Tensor | None = None,
        with_gradient: Tensor | None = None,
    ) -> Iterator[Batch]:
        """Yield this process's parts of the minibatches of all epochs; an epoch has every episode once, in a new order.

        The order is over the episodes of all processes, so that minibatches do not depend on the number of processes.
        Their episodes are exchanged, so that each process has an equal part of every minibatch.

        Args:
            rollout: The episodes.
            advantages: `(N, T)`.
            returns: `(N, T)`, targets of a critic.
            rows: Indices of the episodes to train on, on the host; `None` for all that have a score.
            with_gradient: See `Batch`.
        """
        self.advantages, self.returns = advantages, returns
        returns = torch.zeros_like(advantages) if returns is None else returns
        columns = (rollout.log_probs, rollout.values, advantages, returns, self.indices_of(rollout), with_gradient)
        batch = Batch(rollout.sequences, *columns, self.reference_log_probs, self.later_kl)
        if rows is None:
            [scored] = to_host(rollout.scored)
            rows = scored.nonzero()[:, 0]
        batch, rows = exchanged(batch, rows)
        for _ in range(self.config.num_epochs):
            order = rows[torch.randperm(len(rows), generator=self.shuffler)]
            for chosen in _slices(len(order), self.config.minibatch_size):
                own = order[chosen][rank() :: count()]
                yield batch[own] if len(own) else replace(batch[:1], spare=True)

    def indices_of(self, rollout: Rollout) -> Tensor:
        """Return the indices of a rollout's episodes `(N,)` among those of all processes."""
        start = sum(everyone(len(rollout))[: rank()])
        return torch.arange(start, start + len(rollout), device=rollout.scores.device)

    def step(self, batch: Batch) -> TensorMetrics:
        """Make one optimiser step on the mean loss over the batches of all processes.

        Args:
            batch: The part of this process.

        Returns:
            The metrics of `loss`, means over the episodes whose loss has a gradient, and the norm of the gradient.

        Raises:
            NonFiniteError: If the loss or the norm is NaN or infinite; the weights are then unchanged.
        """
        self.optimizer.zero_grad(set_to_none=True)
        trained = batch.trained()
        weights = [0 if each.spare else self.weight(each) for each in (batch, trained)]
        whole, of_trained = (max(sum(column), 1) for column in zip(*everyone(weights), strict=True))
        metrics: TensorMetrics = {}
        # Gradient accumulation: each micro-batch adds its share of the gradient of the whole batch.
        for rows, counts in pad_micro_batches(_slices(len(trained), self.config.micro_batch_size), spare=slice(0, 1)):
            part = trained if rows.stop - rows.start == len(trained) else trained[rows]
            weight = self.weight(part) if counts and not trained.spare else 0
            loss, reported = self.loss(self.learner(functools.partial(self.evaluate, batch=part)), part)
            (loss * (weight / whole)).backward()
            for name, value in {**reported, "loss": loss}.items():
                metrics[name] = metrics.get(name, 0.0) + weight / of_trained * value.detach().double()
        metrics = dict(zip(metrics, sum_over_processes(torch.stack(list(metrics.values()))), strict=True))
        metrics["val/grad_norm"] = self.apply_gradients(metrics.pop("loss"))
        return metrics

    def finish(self, steps: list[TensorMetrics], further: TensorMetrics | None = None) -> Metrics:
        """Copy trained weights to the policy, and return the metrics of an update.

        Args:
            steps: Metrics of each step, which are averaged.
            further: Metrics of the update.
        """
        self.learner.refresh()
        self._average()
        return on_host(mean_over(steps) | self.constraints.metrics | (further or {}))

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average of the weights towards the policy (Polyak and Juditsky, 1992, with exponential weights)."""
        if self.averaged is not None and self.config.ema_decay is not None:
            for mean, weight in zip(self.averaged.lm.parameters(), self.policy.lm.parameters(), strict=True):
                if mean is not weight:  # weights that are never trained are shared
                    mean.lerp_(weight, 1 - self.config.ema_decay)
            self.averaged.reset_cache()

    def new_log_probs(self, rollout: Rollout) -> Tensor:
        """Return the log-probs `(N, T)` of a rollout under the policy as it is now."""
        return self.policy.sequence_log_probs(rollout.sequences)

    def corrected(self, rollout: Rollout, advantages: Tensor, cap: float) -> tuple[Rollout, Tensor, TensorMetrics]:
        """Correct for a sampler whose log-probs are not those of the trainer (Yao et al., 2025).

        Responses of another engine or of an older policy were sampled from mu and not from pi_old. The ratio of the
        surrogate is then to pi_old, and each token has the truncated importance weight
        w = min(pi_old(a | s) / mu(a | s), C), which multiplies the advantage.

        Args:
            rollout: Episodes with the sampler's log-probs.
            advantages: `(N, T)`.
            cap: C.

        Returns:
            The rollout with the trainer's log-probs, the weighted advantages, and the mean difference of log-probs.
        """
        mask = rollout.response_mask
        log_probs = masked(self.new_log_probs(rollout), mask)  # log pi_old, (N, T)
        difference = masked(log_probs - rollout.log_probs, mask)
        weights = difference.exp().clamp(max=cap)
        metrics = {"sampling/logp_difference": overall_mean(difference.abs(), mask)}
        return replace(rollout, log_probs=log_probs), advantages * weights, metrics

    def refuse_clamp(self) -> None:
        """Raise an error if the KL penalty has a clamp, for a KL that is part of the loss."""
        if self.penalty.clamp is not None:
            raise ConfigError(
                f"kl_clamp={self.penalty.clamp} would remove the gradient of a larger KL in the loss: leave "
                "kl_clamp out, or apply the KL penalty in the reward with kl_in='reward'"
            )

    def measure_kl_for_loss(self, rollout: Rollout, kind: KLInLoss, group_size: int | None = None) -> Tensor:
        """Return the KL estimate of every token, and store what `kl_to_reference` needs.

        Args:
            rollout: The episodes.
            kind: See `KLInLoss`.
            group_size: Number of episodes of each prompt; `None` compares all episodes of the rollout.
        """
        self.reference_log_probs = self.later_kl = None
        if self.penalty.coef > 0:
            self.reference_log_probs = self.penalty.reference.sequence_log_probs(rollout.sequences)
            if kind == "sequence":
                to_go = kl_to_go(self.penalty.exact(self.policy, rollout.sequences))  # (N, T)
                mask = rollout.response_mask
                if group_size is None:
                    self.later_kl = masked(to_go - leave_one_out_mean(to_go, mask), mask)
                else:
                    own = own_steps(mask)  # of the policy, in each row
                    groups = (-1, group_size, to_go.shape[1])
                    columns = (x.gather(1, own).reshape(groups) for x in (to_go, mask))
                    compared = compared_with_others(*columns).view_as(to_go)
                    self.later_kl = torch.zeros_like(to_go).scatter(1, own, compared)
        if self.reference_log_probs is None or self.penalty.estimator == "full":
            return self.penalty.of_sequences(self.policy, rollout.sequences, rollout.log_probs)
        return self.penalty.of_log_probs(rollout.log_probs, self.reference_log_probs, rollout.response_mask)

    def kl_to_reference(self, new: Evaluation, batch: Batch, kind: KLInLoss) -> Tensor:
        """Return the KL of every token `(N, T)` with gradients, for the loss.

        Args:
            new: Evaluation by the current policy.
            batch: The same tokens at rollout time.
            kind: See `KLInLoss`.
        """
        assert batch.reference_log_probs is not None
        mask = batch.response_mask
        log_ratio = masked(new.log_prob - batch.log_probs, mask)
        if kind == "sequence":
            assert batch.later_kl is not None
            assert new.kl is not None
            return sequence_kl(new.kl, log_ratio, batch.later_kl)
        reference = masked(batch.reference_log_probs, mask)
        kl = estimate_kl(masked(new.log_prob, mask), reference, "k3")
        return log_ratio.exp() * kl if kind == "token" else kl

    def training_state(self) -> dict[str, Any]:
        """Return the multipliers of the constraints, for a checkpoint."""
        return {"multipliers": self.constraints.multipliers}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the multipliers of `training_state`."""
        self.constraints.multipliers = state["multipliers"]

    def frozen_models(self) -> dict[str, TokenModel]:
        """Return the frozen models, with the average of the policy, for a checkpoint."""
        averaged = {} if self.averaged is None else {"averaged": self.averaged}
        return {**super().frozen_models(), **averaged}

    def take_frozen_model(self, name: str, model: TokenModel) -> None:
        """Restore a model of `frozen_models`."""
        if name == "averaged":
            self.averaged = model
        else:
            super().take_frozen_model(name, model)


def exchanged(batch: Batch, rows: Tensor) -> tuple[Batch, Tensor]:
    """Return a batch with these rows of all processes, and where they are in it.

    A single process keeps its batch. If no process has any rows, the result has some rows that must not be trained on.
    """
    if count() == 1:
        return batch, rows
    own = batch[rows].to(torch.device("cpu")) if len(rows) else None  # processes exchange host memory
    parts = [part for part in everyone(own) if part is not None]
    whole = Batch.cat(parts).to(batch.log_probs.device) if parts else batch
    return whole, torch.arange(len(whole) if parts else 0)


def _slices(count: int, size: int | None) -> list[slice]:
    """Split `count` rows into parts of at most `size`; `None` for one part."""
    size = size or max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
