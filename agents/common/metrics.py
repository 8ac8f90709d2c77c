"""Metrics of an update, which are copied to the host once when it ends, and metrics of its episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from textgym.rewards.engine.completions_to_score import RewardError
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.kl import KLPenalty

from ..machine.distributed import everyone, gather_columns
from .rollout import Rollout

TensorMetrics = dict[str, Tensor]
"""Metrics by name, 0-dimensional tensors on one device."""


def mean_over(steps: Sequence[TensorMetrics]) -> TensorMetrics:
    """Return the mean of each metric over the steps of an update; empty if there were no steps.

    Steps that were skipped, whose gradient norm is NaN, do not count; if all were, the means are NaN.
    """
    if not steps:
        return {}
    table = torch.stack([torch.stack([value.double() for value in step.values()]) for step in steps])  # (steps, names)
    taken = ~torch.stack([step["val/grad_norm"] for step in steps]).isnan()
    means = torch.where(taken[:, None], table, 0.0).sum(0) / taken.sum()
    return dict(zip(steps[0], means, strict=True))


def on_host(metrics: TensorMetrics) -> dict[str, float]:
    """Return the metrics as plain numbers."""
    if not metrics:
        return {}
    values: list[float] = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def episode_metrics(rollout: Rollout, kl: Tensor, penalty: KLPenalty, scorer: Scorer) -> dict[str, float]:
    """Return metrics of the episodes of all processes; sums over tokens are averaged over episodes.

    Scores are averaged over the episodes that have one; `objective/unscored` is the share of the others.

    Args:
        rollout: Episodes of this process.
        kl: KL to the reference, `(N, T)` nats.
        penalty: The KL penalty.
        scorer: Scorer of the environment, which counts the errors of reward functions.

    Raises:
        RewardError: If no episode has a score.
    """
    columns = gather_columns(
        {
            "kl": kl.sum(1),
            "scored": rollout.scored,
            "raw_scores": rollout.raw_scores,
            "scores": rollout.scores,
            "log_probs": rollout.log_probs.sum(1),
            "cost": penalty.cost(kl).sum(1),
            "tokens": rollout.sequences.response_lengths.float(),
            "ended_by_stop": rollout.ended_by_stop.float(),
            **rollout.components,
        }
    )
    scored = columns["scored"]
    if not scored.any():
        raise RewardError(
            f"none of the {len(scored)} episodes has a score, so there is nothing to learn from: in each of them every "
            f"one of the reward functions {list(scorer.names)} returned None, or one failed under "
            "on_reward_error='skip'"
        )
    raw_scores, rewards = columns["raw_scores"][scored], (columns["scores"] - columns["cost"])[scored]
    metrics: dict[str, Any] = {
        "objective/kl": columns["kl"].mean(),
        "objective/scores": raw_scores.mean(),
        "objective/scores_std": raw_scores.std(correction=0),
        "objective/unscored": 1 - scored.double().mean(),
        "objective/entropy": -columns["log_probs"].mean(),
        "objective/non_score_reward": -columns["cost"].mean(),
        "objective/rlhf_reward": rewards.mean(),
        "objective/kl_coef": penalty.coef,
        "val/response_tokens": columns["tokens"].mean(),
        "val/ended_by_stop": columns["ended_by_stop"].mean(),
    }
    for key in [key for key in columns if "/" in key]:
        kind, name = key.split("/", 1)
        known = columns[key][~columns[key].isnan()]
        if len(known) and kind == "metric":
            metrics[name] = known.mean()
        elif len(known):  # a function may return None for all rows
            metrics |= {f"rewards/{name}/mean": known.mean(), f"rewards/{name}/std": known.std(correction=0)}
    if scorer.scale.active:
        metrics["objective/scores_paid"] = columns["scores"][scored].mean()
    if scorer.on_error != "raise":
        failed = everyone(scorer.errors)
        metrics |= {f"rewards/{name}/errors": sum(errors[name] for errors in failed) for name in scorer.errors}
    return {key: float(value) for key, value in metrics.items()}
