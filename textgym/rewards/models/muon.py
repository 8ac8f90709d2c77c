"""Muon in float32 on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` that computes in float32 on the CPU.

    torch orthogonalises in bfloat16, which is many times slower on processors without bfloat16 instructions, such as
    AMD's before Zen 4. On a GPU this optimiser uses torch's own step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            if any(weight.is_cuda for weight in group["params"]):
                super().step(closure)  # type: ignore[no-untyped-call]
                return
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, object]) -> None:
        """Move one matrix: Nesterov momentum, orthogonalised (Jordan et al., 2024), and decoupled weight decay."""
        lr, decay, momentum = (float(group[name]) for name in ("lr", "weight_decay", "momentum"))  # type: ignore[arg-type]
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)

        update = orthogonalised(gradient.lerp(average, momentum))
        rows, columns = weight.shape
        weight.mul_(1 - lr * decay)
        weight.add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors whose singular values are all near 1.

    Five steps of Newton and Schulz's iteration with the coefficients of https://kellerjordan.github.io/posts/muon,
    which bring values between about 0.01 and 1 to 1 within 0.3 or so.
    """
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = wide.float() / wide.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = wide @ wide.T
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, gram, wide, beta=3.4445)
    return wide.T if len(matrix) > matrix.shape[1] else wide
