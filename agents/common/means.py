"""Means over response tokens. Padding never takes part, whatever stands in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine.distributed import total


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the entries where `mask` is set; 0 where none is."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def overall_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return `masked_mean` over the entries of all processes of the run; without a mask over all of them."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return total(torch.where(mask, values, 0.0).sum()) / total(mask.sum()).clamp(min=1)


def per_episode(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the response tokens of an episode, averaged over episodes."""
    return torch.where(mask, values, 0.0).sum() / len(mask)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale entries to variance 1, and to mean 0 unless `shift_mean` is off; zero in the padding.

    Mean and variance are those of the entries of all processes of the run.
    """
    mean = overall_mean(values, mask)
    variance = overall_mean((values - mean).square(), mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the returns' variance that the values explain: 1 for a perfect critic, 0 for a constant."""
    error = overall_mean((returns - values).square(), mask)
    variance = overall_mean((returns - overall_mean(returns, mask)).square(), mask)
    return 1 - error / variance.clamp(min=1e-8)
