"""Sample tokens from distributions, with one random number for each row.

Tokens are sampled by inverse transform sampling: the cumulative sum of the probabilities is searched for the random
number. So the token of a row depends only on its own random number, not on the other rows. `torch.multinomial` instead
needs V exponential random numbers for each row.

Floating-point cumulative sums that are computed in parallel, as on CUDA, may decrease (pytorch#21780), and may increase
at a token of probability zero. `cummax` would correct only the first. So the sampled token is checked: if its
probability is zero, the most likely token replaces it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Return a token `(B,)` for each row by inverse transform sampling; never one of probability zero.

    Args:
        probabilities: `(B, V)`.
        noise: Uniform random numbers in [0, 1), `(B, 1)`.

    >>> sample(torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]), torch.tensor([[0.5], [0.0]])).tolist()
    [2, 2]
    """
    cumulative = running_sum(probabilities)
    height = noise * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, height, right=True).clamp_(max=probabilities.shape[1] - 1)
    possible = probabilities.gather(1, token) > 0

    if looks_are_free(probabilities.device) and possible.all():  # saves the argmax
        return token[:, 0]
    return torch.where(possible, token, probabilities.argmax(-1, keepdim=True))[:, 0]


def looks_are_free(device: torch.device) -> bool:
    """Return whether the host can read a value without waiting for the device."""
    return device.type == "cpu"


def running_sum(probabilities: Tensor) -> Tensor:
    """Return the cumulative sums `(B, V)` of probabilities `(B, V)`."""
    if probabilities.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return exact_sum(probabilities)
    return probabilities.cumsum(-1)


def exact_sum(probabilities: Tensor) -> Tensor:
    """Return the cumulative sums, computed with integers, whose sum is the same in any order.

    On CUDA the order of a floating-point `cumsum` is not fixed, so torch raises an error in deterministic mode. The
    probabilities are multiplied by 2^52: a float64 is exact for integers up to 2^53, and the sums are close to 2^52.
    """
    return probabilities.double().mul(2.0**52).long().cumsum(-1).double().mul(2.0**-52)
