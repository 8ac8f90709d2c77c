"""Checks that losses, gradients and weights are finite, before an optimiser step and before saving."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from textgym.errors import NonFiniteError
from textgym.settings import OnNonFinite


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


MOST_SKIPPED, OF_STEPS = 10, 100
"""Most steps of the last 100 that may be skipped; more are no accident."""


class FiniteSteps:
    """Decides about optimiser steps: one whose numbers are not finite is an error, or is skipped and counted.

    Args:
        on_nonfinite: `"raise"` or `"skip"`.

    Attributes:
        skipped: Number of steps that were skipped.
    """

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        self._recent: deque[bool] = deque(maxlen=OF_STEPS)  # whether each was skipped

    def allow(self, step: str, numbers: dict[str, Tensor]) -> bool:
        """Return whether to make a step; arguments as `check_finite`.

        Raises:
            NonFiniteError: If a number is not finite, and steps are not to be skipped or too many were.
        """
        try:
            check_finite(step, numbers)
        except NonFiniteError as error:
            if self.on_nonfinite == "raise":
                raise
            self.skipped += 1
            self._recent.append(True)
            if sum(self._recent) > MOST_SKIPPED:
                raise NonFiniteError(
                    f"more than {MOST_SKIPPED} of the last {len(self._recent)} steps were skipped under "
                    f"on_nonfinite='skip', so this is no accident: {error}"
                ) from error
            return False
        self._recent.append(False)
        return True


class FiniteGradients(TrainerCallback):
    """Callback that keeps a `transformers.Trainer` from steps whose gradient is NaN or infinite.

    Args:
        on_nonfinite: Whether such a step is an error or is skipped, see `FiniteSteps`.
    """

    def __init__(self, on_nonfinite: OnNonFinite = "raise") -> None:
        self.steps = FiniteSteps(on_nonfinite)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Check the norm of the gradient; clipping by an infinite norm would change every entry."""
        assert model is not None
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        norm = torch.nn.utils.get_total_norm(own)
        if not self.steps.allow(f"step {state.global_step + 1}", {"gradient norm": norm}):
            model.zero_grad(set_to_none=True)  # optimisers leave weights without a gradient as they are


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
