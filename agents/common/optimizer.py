"""AdamW (Loshchilov and Hutter, 2019) without weight decay, with moments in 32 or in 8 bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MIN_CHANGED = 0.9
"""Minimum share of the weights with a gradient that a step should change."""


def adamw(
    weights: Iterable[nn.Parameter], learning_rate: float, epsilon: float, eight_bit: bool
) -> torch.optim.Optimizer:
    """Return an optimiser of the weights that require gradients.

    Args:
        weights: Weights of the policy.
        learning_rate: Peak learning rate.
        epsilon: Adam's epsilon.
        eight_bit: Whether to store moments in blocks of 8-bit numbers (Dettmers et al., 2022), by bitsandbytes; those
            of tensors with fewer than 4,096 numbers have 32 bits.

    Raises:
        ImportError: If `eight_bit` is set and bitsandbytes is not installed.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    optimizer = _adamw(trained, learning_rate, epsilon, eight_bit)
    warn_of_lost_updates(optimizer)
    return optimizer


def _adamw(trained: list[nn.Parameter], learning_rate: float, epsilon: float, eight_bit: bool) -> torch.optim.Optimizer:
    if not eight_bit:  # fused: one pass over the weights, without temporary tensors of their size
        return torch.optim.AdamW(trained, lr=learning_rate, eps=epsilon, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError("adam_8bit=True needs bitsandbytes: pip install 'textgym[adam8bit]'") from error
    untyped: Any = optim
    return untyped.AdamW8bit(trained, lr=learning_rate, eps=epsilon, weight_decay=0.0)


def warn_of_lost_updates(optimizer: torch.optim.Optimizer) -> None:
    """Measure how many 16-bit weights the first step changes, and warn if many do not change.

    bfloat16 has 8 bits of precision, so a step of less than about 1/256 of a weight is lost to rounding.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    coarse = [weight for weight in weights if weight.dtype in (torch.bfloat16, torch.float16)]
    if not coarse:
        return
    before: list[tuple[Tensor, Tensor]] = []  # weights with a gradient, and their values before the step

    def remember(*_: Any) -> None:
        before[:] = [(weight, weight.detach().clone()) for weight in coarse if weight.grad is not None]

    def compare(*_: Any) -> None:
        if not before or any(group["lr"] == 0 for group in optimizer.param_groups):
            return
        pushed = sum(int(torch.count_nonzero(weight.grad)) for weight, _ in before if weight.grad is not None)
        changed = sum(int(torch.count_nonzero(weight.detach() != old)) for weight, old in before)
        before.clear()
        for hook in hooks:
            hook.remove()
        if changed < MIN_CHANGED * pushed:
            warnings.warn(
                f"the weights are {coarse[0].dtype}, and the first step changed {changed / pushed:.0%} of those that "
                "have a gradient: the other steps are lost to rounding. Train float32 weights: load the model with "
                "dtype=torch.float32, and set bf16=True in the agent's config for passes in bfloat16",
                stacklevel=2,
            )

    hooks = [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(compare)]
