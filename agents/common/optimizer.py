"""The optimisers of agents: AdamW (Loshchilov and Hutter, 2019), with moments in 32 or 8 bits, or another of torch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from textgym.models.machine.schedules import learning_rate_factor
from textgym.settings import Check, NotNegative, Positive, Share, check_settings, refuse_together

MIN_CHANGED = 0.9
"""Minimum share of the weights with a gradient that a step should change."""


def _is_optimizer(name: str) -> bool:
    found = getattr(torch.optim, name, None)
    # LBFGS evaluates the loss several times in a step.
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")


OptimizerName = Annotated[str, Check("the name of a class of torch.optim, other than LBFGS", _is_optimizer)]


@dataclass
class OptimizerConfig:
    """Hyperparameters of the optimiser of all agents that learn from rollouts."""

    learning_rate: NotNegative = 1e-4
    """Peak learning rate."""
    warmup: Share = 0.0
    """Share of the updates in which the learning rate rises linearly to its peak."""
    anneal_learning_rate: bool = True
    """Whether the learning rate decreases to zero over `total_episodes`, after the warm-up."""
    annealing: Literal["linear", "cosine"] = "linear"
    """How the learning rate decreases."""
    optimizer: OptimizerName = "AdamW"
    """Class of torch.optim, such as "AdamW", "Adam", "SGD" or "RMSprop"."""
    optimizer_options: dict[str, float] = field(default_factory=dict)
    """Further arguments of the optimiser's class, such as momentum."""
    weight_decay: NotNegative = 0.0
    """Weight decay."""
    adam_epsilon: NotNegative = 1e-5
    """Epsilon of Adam and its variants; with a small one the first updates are large."""
    adam_8bit: bool = False
    """Keep AdamW's two moments in 8 bits each instead of 32; needs bitsandbytes."""
    max_grad_norm: Positive = 1.0
    """Maximum norm of the gradient of a minibatch; larger gradients are scaled down."""

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_together(
            self,
            {
                ("adam_8bit", "optimizer"): "only AdamW has moments in 8 bits",
                ("anneal_learning_rate", "annealing"): "a constant learning rate does not decrease",
            },
        )

    def learning_rate_factor(self, update: int, num_updates: float) -> float:
        """Return what the peak learning rate is multiplied by in an update, from 0, of so many."""
        decay = self.annealing if self.anneal_learning_rate else "none"
        return learning_rate_factor(update, num_updates, self.warmup, decay)


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
    config = OptimizerConfig(learning_rate, adam_epsilon=epsilon, adam_8bit=eight_bit)
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
