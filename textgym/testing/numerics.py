"""assert_close: compares floats with a tolerance that follows from how they were computed, not from one machine.

Two ways to compute the same number round differently: another order of a sum, another batch, another BLAS library,
another processor. Each addition to a sum is off by at most half of eps times the size of the sum. Such errors have
random signs, so `terms` of them add up to about the square root of `terms`, not to `terms` (Higham and Mary, 2019, "A
new approach to probabilistic rounding error analysis"). This is the one rule of the project's tests:

    tolerance = SAFETY * eps(dtype) * sqrt(terms) * scale

- `terms` is the length of the sum: 1 for single operations, the width for a matrix product. A forward pass is a chain
  of sums, so it counts all of their terms: `terms_of(model)`.
- `scale` is the size of what is summed. If the result is as large as that, leave it out. Give it where larger numbers
  cancel: a difference of two log-probs of size 5 has the errors of numbers of size 5, however small it is itself.
- `dtype` is the arithmetic that was used, float32 unless an argument is coarser.

What needs no rounding needs no tolerance: compare tokens, masks, shapes, files and copies of weights with `==`. What is
promised bit for bit is tested under the conditions that the promise names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

SAFETY = 4
"""Each rounding error is spread evenly over half of eps to both sides, so that the difference of two computations has a
standard deviation of eps * sqrt(terms / 6) * scale: the tolerance is about ten of them."""


def tolerance(terms: float = 1, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Return how far two ways to compute the same sum may be apart.

    >>> f"{tolerance(terms=400, scale=5.0):.1e}"
    '4.8e-05'
    """
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(terms) * scale


def terms_of(*modules: nn.Module) -> int:
    """Return the terms of all sums that a number goes through in a forward pass: the input width of every matrix."""
    return sum(weight.shape[-1] for module in modules for weight in module.parameters() if weight.ndim == 2)


def assert_close(
    actual: Any,
    expected: Any,
    *,
    terms: float = 1,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    what: str = "",
) -> None:
    """Check that floats differ by no more than rounding: by at most 4 * eps(dtype) * sqrt(terms) * scale.

    Args:
        actual: a number, a list of numbers, a tensor, an array, or a list or mapping of these.
        expected: the same kind and shape; of a mapping, the same keys. Infinities and NaN must be at the same places.
        terms: the length of the longest sum behind each number; `terms_of(model)` for a forward pass.
        scale: the size of what is summed. None: the largest absolute value among the expected numbers.
        dtype: the arithmetic behind the numbers. None: the coarser of the two dtypes, and float32 at least, since a
            float64 that came out of a model is a converted float32. Pass `torch.float64` where all of it was that.
        what: begins the error message.

    Raises:
        AssertionError: another shape, other keys, or a difference above the tolerance; it says how large both are.

    >>> assert_close(sum([0.1] * 10), 1.0, terms=10)
    >>> assert_close(torch.tensor([0.5, 2.0]), [0.5, 2.001])
    Traceback (most recent call last):
    AssertionError: 1 of 2 numbers differ by more than rounding: by up to 1.0e-03 at [1], 9.5e-07 is allowed
    """
    prefix = f"{what}: " if what else ""
    if isinstance(expected, Sequence) and not all(isinstance(number, Real) for number in expected):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), f"{prefix}{set(actual) ^ set(expected)} are on one side only"
        for key in expected:
            where = f"{prefix}{key}"
            assert_close(actual[key], expected[key], terms=terms, scale=scale, dtype=dtype, what=where)
        return

    if dtype is None:
        dtype = max((torch.float32, _dtype(actual), _dtype(expected)), key=lambda kind: torch.finfo(kind).eps)
    mine, other = _float64(actual), _float64(expected)
    assert mine.shape == other.shape, f"{prefix}shape {mine.shape}, expected {other.shape}"

    finite = np.isfinite(other)
    if scale is None:
        scale = float(np.abs(other[finite]).max(initial=0.0))
    allowed = tolerance(terms, scale, dtype)

    same = (mine == other) | (np.isnan(mine) & np.isnan(other))  # infinities have no difference
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.where(np.isfinite(mine) & finite, np.abs(mine - other), np.inf))
    wrong = difference > allowed
    if wrong.any():
        worst = np.unravel_index(difference.argmax(), difference.shape)
        raise AssertionError(
            f"{prefix}{wrong.sum()} of {wrong.size} numbers differ by more than rounding: "
            f"by up to {difference.max():.1e} at {[int(index) for index in worst]}, {allowed:.1e} is allowed"
        )


def assert_trained_alike(actual: Any, expected: Any, learning_rate: float) -> None:
    """Check that two runs of the same few updates ended with the same weights, up to what Adam makes of rounding.

    Adam divides a gradient by its own size, so that a mistake moves most weights by about the learning rate, however
    small the gradients are. Where a gradient is itself no more than rounding, its step is arbitrary. So all weights but
    one in a thousand must agree to a twentieth of the learning rate, which is far above what rounding does to them.

    Args:
        actual: weights, as one vector, a list of tensors or a mapping of them.
        expected: the same kind and shapes.
        learning_rate: of the updates.

    Raises:
        AssertionError: too many weights are apart; it says how many, and how far.

    >>> assert_trained_alike(torch.ones(4), torch.ones(4) + 1e-6, learning_rate=1e-3)
    >>> assert_trained_alike(torch.ones(4), torch.ones(4) + 1e-4, learning_rate=1e-3)
    Traceback (most recent call last):
    AssertionError: 4 of 4 weights are more than 5% of the learning rate apart, up to 1.0e-04
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        actual, expected = [actual[name] for name in expected], list(expected.values())
    mine, other = _vector(actual), _vector(expected)
    assert mine.shape == other.shape
    difference = np.abs(mine - other)
    apart = ~(difference <= 0.05 * learning_rate)  # so that NaN counts
    assert apart.mean() <= 0.001, (
        f"{apart.sum()} of {apart.size} weights are more than 5% of the learning rate apart, "
        f"up to {difference.max():.1e}"
    )


def _dtype(numbers: Any) -> torch.dtype:
    """Return the float dtype of a tensor or array; what has none is as exact as it can be."""
    if isinstance(numbers, np.ndarray | np.floating):
        numbers = torch.empty(0, dtype=torch.float32 if numbers.dtype == np.float32 else torch.float64)
    if isinstance(numbers, torch.Tensor) and numbers.is_floating_point():
        return numbers.dtype
    return torch.float64


def _float64(numbers: Any) -> np.ndarray:
    """Return any numbers as one array that rounds none of float32 or below."""
    if isinstance(numbers, torch.Tensor):
        return numbers.detach().double().cpu().numpy()
    return np.asarray(numbers, dtype=np.float64)


def _vector(weights: Any) -> np.ndarray:
    """Return weights in one vector."""
    if isinstance(weights, Sequence):
        return np.concatenate([_vector(weight) for weight in weights])
    return _float64(weights).reshape(-1)
