"""Figures of an update: they stay on the device until it ends, and come to the host in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Figures = dict[str, Tensor]
"""Numbers by their names, 0-dimensional tensors on one device."""


def mean_over(steps: Sequence[Figures]) -> Figures:
    """The mean of each figure over the steps of an update; nothing if there were none."""
    if not steps:
        return {}
    table = torch.stack([torch.stack([figure.double() for figure in step.values()]) for step in steps])
    return dict(zip(steps[0], table.mean(0), strict=True))


def on_host(figures: Figures) -> dict[str, float]:
    """The figures as plain numbers."""
    if not figures:
        return {}
    values: list[float] = torch.stack([figure.double() for figure in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))
