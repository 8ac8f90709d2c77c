"""Means over response tokens. Padding is excluded, whatever its values are, NaN included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from textgym.models.machine.transfer import to_device

from ..machine.distributed import everyone, rank, sum_over_processes

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""A standard deviation below this share of the mean is rounding of float32: the values are equal."""


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values where `mask` is True and 0 elsewhere, with no gradient there."""
    return torch.where(mask, values, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the entries where `mask` is True; 0 if there are none."""
    return masked(values, mask).sum() / mask.sum().clamp(min=1)


def overall_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return `masked_mean` over the entries of all processes of the run; without a mask over all entries."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return sum_over_processes(masked(values, mask).sum()) / sum_over_processes(mask.sum()).clamp(min=1)


def per_episode(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the response tokens of an episode, averaged over episodes."""
    return masked(values, mask).sum() / len(mask)


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
    whitened = masked(whitened, differs(variance.sqrt(), mean))
    return masked(whitened if shift_mean else whitened + mean, mask).to(values.dtype)


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


def explained_variance_within_prompts(
    values: Tensor, returns: Tensor, mask: Tensor, prompts: Sequence[bytes]
) -> Tensor:
    """Return the share of the variance around each prompt's mean return that the values explain; at most 1.

    A critic that only knows which prompts are easy has a high `explained_variance` and 0 here. Returns and errors are
    compared with their own means over the tokens of all rows with the same prompt, so an offset of a prompt changes
    nothing. It is below 0 if the critic's differences between and within responses to a prompt are worse than none.

    Prompts with a single row are left out, because their mean would be that of one response.

    Args:
        values: `(N, T)`.
        returns: `(N, T)`.
        mask: Bool `(N, T)`, the tokens that count; rows without any do not count as rows of their prompt.
        prompts: `(N,)`, token ids of each row's prompt.

    Returns:
        The share; NaN if no prompt has two rows, or if the returns of each prompt are equal.
    """
    groups, number = _same_prompts(prompts)
    [groups] = to_device(mask.device, groups)

    def sums(columns: Tensor) -> Tensor:
        """Return the sums over the rows of each prompt, in all processes."""
        zeros = torch.zeros(number, dtype=torch.double, device=mask.device)
        return sum_over_processes(zeros.index_add(0, groups, columns.double()))  # (prompts,)

    mask = mask & (sums(mask.any(1)) > 1)[groups][:, None]
    tokens = sums(mask.sum(1)).clamp(min=1)

    def spread(numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of squares around the mean of each prompt, and whether it is more than rounding."""
        numbers = masked(numbers.double(), mask)
        means = sums(numbers.sum(1)) / tokens
        squares = sums(masked(numbers - means[groups][:, None], mask).square().sum(1))
        return squares.sum(), differs((squares / tokens).sqrt(), means).any()

    (variance, is_different), (error, _) = spread(returns), spread(returns.double() - values)
    return torch.where(is_different, 1 - error / variance, torch.nan)


def _same_prompts(prompts: Sequence[bytes]) -> tuple[Tensor, int]:
    """Return the index of each row's prompt `(N,)`, and the number of different prompts of all processes."""
    parts = everyone(list(prompts))
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(itertools.chain(*parts)))}
    return torch.tensor([places[prompt] for prompt in parts[rank()]], dtype=torch.long), len(places)
