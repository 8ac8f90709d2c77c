"""Means over response tokens. Padding never takes part, whatever stands in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine.distributed import total

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""A standard deviation below this share of the mean is float32's rounding: the values are all the same."""


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


def differs(standard_deviation: Tensor, mean: Tensor) -> Tensor:
    """Return whether values with this deviation and mean differ at all, but for rounding."""
    return standard_deviation > ROUNDING * mean.abs()


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale entries to variance 1, and to mean 0 unless `shift_mean` is off; zero in the padding.

    Mean and variance are those of the entries of all processes of the run. Entries that are all the same, whatever
    their size, are exactly 0, or their mean: float32's rounding of a mean would otherwise be scaled up.
    """
    exact = values.double()  # in which the mean of equal values is exactly their value
    mean = overall_mean(exact, mask)
    variance = overall_mean((exact - mean).square(), mask)
    whitened = (exact - mean) * torch.rsqrt(variance + 1e-8)
    whitened = torch.where(differs(variance.sqrt(), mean), whitened, 0.0)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the returns' variance that the values explain: 1 for a perfect critic, 0 for a constant.

    Returns that are all the same have no variance to explain: 1 if the values equal them, otherwise 0.
    """
    exact = returns.double()
    error = overall_mean((exact - values).square(), mask)
    mean = overall_mean(exact, mask)
    variance = overall_mean((exact - mean).square(), mask)
    constant = (error == 0).double()
    return torch.where(differs(variance.sqrt(), mean), 1 - error / variance, constant)
