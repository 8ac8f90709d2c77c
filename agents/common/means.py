"""Means over response tokens. Padding is excluded, whatever its values are, NaN included."""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine.distributed import sum_over_processes

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""A standard deviation below this share of the mean is rounding of float32: the values are equal."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the entries where `mask` is True; 0 if there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def overall_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return `masked_mean` over the entries of all processes of the run; without a mask over all entries."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return sum_over_processes(torch.where(mask, values, 0.0).sum()) / sum_over_processes(mask.sum()).clamp(min=1)


def per_episode(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the response tokens of an episode, averaged over episodes."""
    return torch.where(mask, values, 0.0).sum() / len(mask)


def differs(standard_deviation: Tensor, mean: Tensor) -> Tensor:
    """Return whether values with this standard deviation and mean differ by more than rounding."""
    return standard_deviation > ROUNDING * mean.abs()


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Normalise entries to variance 1, and to mean 0 unless `shift_mean` is False; zero in the padding.

    Mean and variance are over the entries of all processes of the run. If all entries are equal, the result is exactly
    0, or their mean without `shift_mean`: otherwise the rounding error of the mean would be scaled to variance 1.
    """
    exact = values.double()  # in float64 the mean of equal float32 values is exactly their value
    mean = overall_mean(exact, mask)
    variance = overall_mean((exact - mean).square(), mask)
    whitened = (exact - mean) * torch.rsqrt(variance + 1e-8)
    whitened = torch.where(differs(variance.sqrt(), mean), whitened, 0.0)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the returns' variance that the values explain: 1 for a perfect critic, 0 for a constant.

    Equal returns have no variance to explain: the result is 1 if the values equal them, otherwise 0.
    """
    exact = returns.double()
    error = overall_mean((exact - values).square(), mask)
    mean = overall_mean(exact, mask)
    variance = overall_mean((exact - mean).square(), mask)
    constant = (error == 0).double()
    return torch.where(differs(variance.sqrt(), mean), 1 - error / variance, constant)
