"""Sample from a distribution over tokens with one random number a row.

A token is chosen by inverting the distribution function: the running sum of the probabilities is searched for the
random number. So a row's token depends on its own number alone, whatever the other rows do. A race of exponential
variables, as in `torch.multinomial`, needs V random numbers a row.

A running sum in floats need not be monotone where it is added up in parallel, as on CUDA (pytorch#21780), and may grow
at a token of probability zero. `cummax` mends only the first. So the token that was found is checked
instead: one of probability zero gives way to the likeliest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The tokens `(B,)` that uniform numbers `(B, 1)` from [0, 1) stand for in distributions `(B, V)`.

    A token of probability zero is never chosen.

    >>> sample(torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]), torch.tensor([[0.5], [0.0]])).tolist()
    [2, 2]
    """
    cumulative = running_sum(probabilities)
    height = noise * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, height, right=True).clamp_(max=probabilities.shape[1] - 1)
    possible = probabilities.gather(1, token) > 0

    if looks_are_free(probabilities.device) and possible.all():  # saves the search for the likeliest
        return token[:, 0]
    return torch.where(possible, token, probabilities.argmax(-1, keepdim=True))[:, 0]


def looks_are_free(device: torch.device) -> bool:
    """Whether the host may ask for a value without waiting for a queue of work."""
    return device.type == "cpu"


def running_sum(probabilities: Tensor) -> Tensor:
    """The distribution functions `(B, V)` of probabilities `(B, V)`."""
    if probabilities.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return exact_sum(probabilities)
    return probabilities.cumsum(-1)


def exact_sum(probabilities: Tensor) -> Tensor:
    """The running sum in integers, which add up to the same in any order.

    On CUDA that of floats has no fixed order, so torch refuses it where it is told to be deterministic.
    """
    return probabilities.double().mul(2.0**52).long().cumsum(-1).double().mul(2.0**-52)
