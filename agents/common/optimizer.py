"""AdamW (Loshchilov and Hutter, 2019) as the agents use it: without decay, its moments in 32 bits or in 8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def adamw(
    weights: Iterable[nn.Parameter], learning_rate: float, epsilon: float, eight_bit: bool
) -> torch.optim.Optimizer:
    """An optimiser of those weights that are trained.

    Args:
        eight_bit: moments in blocks of 8-bit numbers (Dettmers et al., 2022), by bitsandbytes; those of tensors of
            fewer than 4,096 numbers are in 32 bits.

    Raises:
        ImportError: `eight_bit` without bitsandbytes.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    if not eight_bit:  # fused: one pass over the weights, with no temporary of their size
        return torch.optim.AdamW(trained, lr=learning_rate, eps=epsilon, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError("adam_8bit=True needs bitsandbytes: pip install 'textgym[adam8bit]'") from error
    untyped: Any = optim
    return untyped.AdamW8bit(trained, lr=learning_rate, eps=epsilon, weight_decay=0.0)
