"""The optimisers of agents: AdamW (Loshchilov and Hutter, 2019), with moments in 32 or 8 bits, or another of torch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..configs.rollout import OptimizerConfig

MIN_CHANGED = 0.9
"""Minimum share of the weights with a gradient that a step should change."""


class PartSettings(NamedTuple):
    """Settings of the optimiser for one part of the weights, such as the critic."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float


def make_optimizer(
    parts: dict[str, list[nn.Parameter]], settings: dict[str, PartSettings], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Return an optimiser with one group for each part of the weights; the key "part" of a group is its name.

    Args:
        parts: Weights by part; those that do not require gradients are left out, and so are empty parts.
        settings: Settings of each part.
        config: Settings of the optimiser.

    Raises:
        ImportError: If `adam_8bit` is set and bitsandbytes is not installed.
        TypeError: If the optimiser's class does not take one of `optimizer_options`.
    """
    groups: list[dict[str, Any]] = []
    for part, weights in parts.items():
        if trained := [weight for weight in weights if weight.requires_grad]:
            learning_rate, weight_decay, _ = settings[part]
            groups.append({"params": trained, "part": part, "lr": learning_rate, "weight_decay": weight_decay})
    kind, options = _optimizer_class(config)
    optimizer: torch.optim.Optimizer = kind(groups, **{**options, **config.optimizer_options})
    warn_of_lost_updates(optimizer)
    return optimizer


def _optimizer_class(config: OptimizerConfig) -> tuple[Any, dict[str, Any]]:
    """Return the class of an optimiser, and arguments that depend on the class."""
    options: dict[str, Any] = {"lr": config.learning_rate}
    if config.adam_8bit:
        return eight_bit_adamw(), {**options, "eps": config.adam_epsilon}
    kind = getattr(torch.optim, config.optimizer)
    if "Adam" in config.optimizer and "eps" in inspect.signature(kind).parameters:
        options["eps"] = config.adam_epsilon
    if config.optimizer in ("Adam", "AdamW"):  # one pass over the weights, without temporary tensors of their size
        options["fused"] = True
    return kind, options


def eight_bit_adamw() -> Any:
    """Return AdamW with moments in blocks of 8-bit numbers (Dettmers et al., 2022), a class of bitsandbytes.

    The moments of tensors with fewer than 4,096 numbers have 32 bits.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError("adam_8bit=True needs bitsandbytes: pip install 'textgym[adam8bit]'") from error
    untyped: Any = optim
    return untyped.AdamW8bit


def adamw(
    weights: Iterable[nn.Parameter], learning_rate: float, epsilon: float, eight_bit: bool
) -> torch.optim.Optimizer:
    """Return AdamW without weight decay, of the weights that require gradients."""
    config = OptimizerConfig(learning_rate=learning_rate, adam_epsilon=epsilon, adam_8bit=eight_bit)
    return make_optimizer({"policy": list(weights)}, {"policy": PartSettings(learning_rate, 0.0, 1.0)}, config)


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
        if not pushed:  # such as with equal rewards: the next step is measured
            return
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
