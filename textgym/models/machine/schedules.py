"""Learning-rate schedules: linear warm-up, then decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

Decay = Literal["linear", "cosine", "none"]


def learning_rate_factor(update: float, num_updates: float, warmup: float, decay: Decay) -> float:
    """Return what the peak learning rate is multiplied by in an update; no update has a learning rate of 0.

    The warm-up of transformers starts at 0, so its first update is lost, which may be the only one.

    Args:
        update: The update, from 0; a smaller one before it counts as a part of an update.
        num_updates: Number of updates, n.
        warmup: Share of them in which the learning rate rises.
        decay: How it falls afterwards, towards 0 at update n, which is not made.
    """
    rising = math.ceil(warmup * num_updates)
    if update < rising:
        return min((update + 1) / rising, 1.0)
    if update >= num_updates:  # after the last update, transformers asks for one more
        return 0.0 if decay != "none" else 1.0
    done = (update - rising) / (num_updates - rising)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "none": 1.0}[decay]


def warmup_and_decay(optimizer: Optimizer, num_updates: int, warmup: float, decay: Decay) -> LambdaLR:
    """Return a scheduler of `learning_rate_factor`."""
    from torch.optim.lr_scheduler import LambdaLR  # here, so that configs are read without torch

    return LambdaLR(optimizer, lambda update: learning_rate_factor(update, num_updates, warmup, decay))
