"""Checks that losses, gradients and weights are finite, before an optimiser step and before saving."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from textgym.errors import NonFiniteError


def check_finite(step: str, numbers: dict[str, Tensor]) -> None:
    """Check numbers before an optimiser step; the host waits for the device once for all of them.

    Args:
        step: Name of the step, for the error message.
        numbers: The numbers by name, on one device.

    Raises:
        NonFiniteError: If one of them is NaN or infinite.
    """
    values = torch.stack([number.detach().double() for number in numbers.values()]).tolist()
    for quantity, value in zip(numbers, values, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {quantity} of {step} is {value}: the step was not made, and the weights are as they were before "
                "it. Look for numbers that are too large among rewards and log-probs, lower learning_rate, or train in "
                "float32"
            )


class FiniteGradients(TrainerCallback):
    """Callback that stops a `transformers.Trainer` before a step whose gradient is NaN or infinite.

    Raises:
        NonFiniteError: Before the step.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Check the norm of the gradient; clipping by an infinite norm would change every entry."""
        assert model is not None
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        check_finite(f"step {state.global_step + 1}", {"gradient norm": torch.nn.utils.get_total_norm(own)})


def check_weights(module: nn.Module) -> None:
    """Check weights before they are saved.

    Raises:
        NonFiniteError: If one of them is NaN or infinite.
    """
    for name, weight in module.named_parameters():
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"the weight {name!r} has a NaN or infinite entry: nothing was saved, and earlier files are unchanged. "
                "Resume from them with a lower learning_rate"
            )
