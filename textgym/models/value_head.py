"""ValueHead: a linear value function whose output is on a running scale, so that it learns in any unit of reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

MOST_FITS = 10
"""Running moments are those of about so many of the newest updates."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""A standard deviation below this share of the mean is rounding of float32: there is no spread."""


class ValueHead(nn.Linear):
    """V(s) = mean + std (w h(s) + b), with running moments of the returns (PopArt; van Hasselt et al., 2016).

    The weights learn a target of mean 0 and variance 1, whatever the unit of the rewards. The output is in that unit. A
    head that was never fitted has mean 0 and std 1, so it is a linear layer. Weights and moments are float32.

    Args:
        in_features: Width of the hidden states.
        device: Device of the weights.
    """

    mean: Tensor
    std: Tensor
    fits: Tensor

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        super().__init__(in_features, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("mean", torch.zeros((), device=device))
        self.register_buffer("std", torch.ones((), device=device))
        self.register_buffer("fits", torch.zeros((), device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values of hidden states `(..., d)`, `(..., 1)` in units of reward."""
        return self.mean + self.std * super().forward(hidden)

    @torch.no_grad()
    def fit(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Update the running moments by those of new returns, and the weights so that the values stay what they are.

        A head whose weights are all zero has learned nothing, so it keeps its zeros and its values become the mean.

        Args:
            mean: Mean of the returns, float64.
            variance: Variance of the returns, float64.

        Returns:
            Whether the values became the mean, a bool of no dimension on the device.
        """
        # 1. Moments: all updates have equal weight at first, and 1 / MOST_FITS is the least weight of the newest.
        rate = 1 / (self.fits.double() + 1).clamp(max=MOST_FITS)
        old_mean, old_std = self.mean.double(), self.std.double()
        finite = mean.isfinite() & variance.isfinite()  # otherwise the loss is not, either, and its step is refused
        mean = torch.where(finite, mean, old_mean)
        variance = torch.where(finite, variance, old_std.square())
        difference = mean - old_mean
        new_mean = old_mean + rate * difference
        spread = ((1 - rate) * old_std.square() + rate * variance + rate * (1 - rate) * difference.square()).sqrt()

        # 2. Equal returns have no scale: until there is a spread, std stays 1 and the update does not count.
        known = spread > ROUNDING * new_mean.abs()
        new_std = torch.where(known, spread, old_std)

        # 3. Weights: std' (w' h + b') + mean' = std (w h + b) + mean.
        new = ~(self.weight.any() | self.bias.any())
        bias = (old_std * self.bias + old_mean - new_mean) / new_std
        self.weight.mul_(old_std / new_std)
        self.bias.copy_(torch.where(new, 0.0, bias))
        self.mean.copy_(new_mean)
        self.std.copy_(new_std)
        self.fits.add_(known)
        return new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *further: Any) -> None:
        """Load weights of a head, or of a linear layer, which has no moments."""
        for name, value in (("mean", 0.0), ("std", 1.0), ("fits", 0.0)):
            state_dict.setdefault(prefix + name, torch.tensor(value))
        super()._load_from_state_dict(state_dict, prefix, *further)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device; another dtype, such as that of the model around it, would round the moments."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self
