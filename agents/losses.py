"""Losses over padded (N, T) tokens. Padding is replaced before any arithmetic, so NaN there stays there (trap 15)."""

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


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al., 2017, equation 7), a mean over real tokens.

    L = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] with r = pi / pi_old. `approx_kl` is E[(r - 1) - log r].
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    with torch.no_grad():
        approx_kl = masked_mean(ratio - 1 - log_ratio, mask)
        clip_fraction = masked_mean((clipped < plain).float(), mask)
    return PolicyLoss(
        masked_mean(-torch.minimum(plain, clipped), mask), approx_kl, clip_fraction, masked_mean(ratio.detach(), mask)
    )


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
