"""Muon in float32 against torch's, which works in bfloat16."""

from __future__ import annotations

import pytest
import torch

from textgym.rewards.models.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_it_steps_as_torchs_muon_does_to_bfloat16s_rounding(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    weights = []
    for kind in (Muon, torch.optim.Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        weights.append(weight.detach())
    moved = (weights[1] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.02 * moved


def test_the_singular_values_come_near_one() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_matrix_without_a_gradient_stays() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(3, 4))
