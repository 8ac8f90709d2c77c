"""Losses over padded (N, T) tokens. Padding is replaced before any arithmetic, so NaN there stays there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .advantages import masked_mean


class PolicyLoss(NamedTuple):
    """The loss to minimise, and what the update did: scalars without gradient."""

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio: Tensor


class ValueLoss(NamedTuple):
    """The loss to minimise, and the share of tokens at which the clipped error was the larger one."""

    loss: Tensor
    clip_fraction: Tensor


def per_episode(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over the real tokens of an episode, averaged over episodes."""
    return torch.where(mask, values, 0.0).sum() / len(mask)


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-(1 / N) sum over episodes and tokens of A log pi, whose gradient is the policy gradient of N episodes.

    A sum over the tokens of an episode, as in the policy gradient theorem (Sutton et al., 2000), not a mean: the
    gradient of a long text counts as much as it does in the objective.
    """
    return -per_episode(log_probs * torch.where(mask, advantages, 0.0), mask)


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al., 2017, equation 7), a mean over real tokens.

    L = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] with r = pi / pi_old. `approx_kl` is E[(r - 1) - log r].

    Args:
        log_probs: `(N, T)`, with gradients.
        old_log_probs: `(N, T)` behaviour log-probs.
        advantages: `(N, T)`.
        mask: bool `(N, T)`, real tokens.
        clip_range: eps.
        clip_range_high: another eps above 1, for the upper bound (Yu et al., 2025, DAPO's clip-higher).
        dual_clip: c above 1: where A < 0 the objective is at least c A, so that no ratio, however large, rules an
            update (Ye et al., 2020, equation 5).
        weights: `(N, T)`, in place of the mean over real tokens: the loss is their weighted sum.
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + high) * advantages
    objective = torch.minimum(plain, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped < plain).float(), mask)
    return _policy_loss(-objective, log_ratio, mask, clip_fraction, weights)


def sequence_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """PPO's clipped surrogate with a whole episode as one action, a mean over episodes.

    L = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] with r = prod_t pi(a_t | s_t) / pi_old(a_t | s_t), so that one text
    has one ratio (Ahmadian et al., 2024, section 3). `advantages` are `(N,)`.
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    ratio = log_ratio.sum(1).exp()  # (N,)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    with torch.no_grad():
        clip_fraction = (clipped < plain).float().mean()
        approx_kl = masked_mean(log_ratio.exp() - 1 - log_ratio, mask)
    return PolicyLoss(-torch.minimum(plain, clipped).mean(), approx_kl, clip_fraction, ratio.detach().mean())


def penalty_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, beta: float
) -> PolicyLoss:
    """PPO's penalised surrogate (Schulman et al., 2017, equation 8), a mean over real tokens.

    L = -E[r A] + beta KL(pi_old, pi), the KL estimated from the old policy's samples by E[(r - 1) - log r].
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    ratio = log_ratio.exp()
    loss = -ratio * torch.where(mask, advantages, 0.0) + beta * (ratio - 1 - log_ratio)
    return _policy_loss(loss, log_ratio, mask, torch.zeros((), device=mask.device), None)


def _policy_loss(
    per_token: Tensor, log_ratio: Tensor, mask: Tensor, clip_fraction: Tensor, weights: Tensor | None
) -> PolicyLoss:
    loss = masked_mean(per_token, mask) if weights is None else (weights * per_token).sum()
    with torch.no_grad():
        ratio = log_ratio.exp()
        approx_kl = masked_mean(ratio - 1 - log_ratio, mask)
    return PolicyLoss(loss, approx_kl, clip_fraction, masked_mean(ratio, mask))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float | None
) -> ValueLoss:
    """Half the squared error, at least that of the value clipped to `clip_range` around the old one.

    Where the clipped error is the larger, moving the value further changes nothing, so its gradient is zero.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    if clip_range is None:
        return ValueLoss(0.5 * masked_mean(error, mask), torch.zeros((), device=values.device))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped_error = (clipped - returns).square()
    with torch.no_grad():
        clip_fraction = masked_mean((clipped_error > error).float(), mask)
    return ValueLoss(0.5 * masked_mean(torch.maximum(error, clipped_error), mask), clip_fraction)
