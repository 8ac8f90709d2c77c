"""PPO's losses against values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from textgym.agents.losses import clipped_policy_loss, clipped_value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def one(value: float, gradient: bool = False) -> Tensor:
    return torch.tensor([[value]], requires_grad=gradient)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "flat"),
    [
        (2.0, 1.1, -2.2, False),  # better and within the range: push on
        (2.0, 1.5, -2.4, True),  # better and already far: clipped, no gradient
        (2.0, 0.5, -1.0, False),  # better but made less likely: bring it back
        (-2.0, 0.9, 1.8, False),  # worse and within the range: push on
        (-2.0, 0.5, 1.6, True),  # worse and already far: clipped, no gradient
        (-2.0, 1.5, 3.0, False),  # worse but made more likely: bring it back
    ],
)
def test_trap_18_clip_signs(advantage: float, ratio: float, expected: float, flat: bool) -> None:
    log_probs = one(math.log(ratio), gradient=True)
    result = clipped_policy_loss(log_probs, one(0.0), one(advantage), ONE, 0.2)
    torch.testing.assert_close(result.loss.item(), expected, atol=1e-5, rtol=0)
    result.loss.backward()
    assert (log_probs.grad.item() == 0) == flat
    assert result.clip_fraction.item() == float(flat)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "flat"),
    [
        (0.1, 0.0, 1.0, 0.405, False),  # within the range
        (0.5, 0.0, 1.0, 0.32, True),  # towards the target but too far: the clipped error counts, no gradient
        (0.5, 0.0, -1.0, 1.125, False),  # away from the target: the plain error counts
        (-0.5, 0.0, 0.1, 0.18, False),  # past the range on the wrong side
    ],
)
def test_trap_17_clipped_value_loss(value: float, old: float, target: float, expected: float, flat: bool) -> None:
    values = one(value, gradient=True)
    clipped = clipped_value_loss(values, one(old), one(target), ONE, 0.2)
    plain = clipped_value_loss(values, one(old), one(target), ONE, None)
    torch.testing.assert_close(clipped.loss.item(), expected, atol=1e-6, rtol=0)
    assert clipped.loss >= plain.loss
    clipped.loss.backward()
    assert (values.grad.item() == 0) == flat


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_trap_15_junk_in_padding_reaches_neither_loss_nor_gradient(junk: float) -> None:
    mask = torch.tensor([[True, True, False]])
    clean = [torch.tensor([[0.1, -0.2, 0.0]]) + i for i in range(3)]
    dirty = [torch.where(mask, x, junk) for x in clean]
    dirty[0].requires_grad_()
    policy = clipped_policy_loss(dirty[0], dirty[0].detach() - 0.1, dirty[2], mask, 0.2)
    value = clipped_value_loss(dirty[0], dirty[1], dirty[2], mask, 0.2)
    (policy.loss + value.loss).backward()
    assert all(torch.isfinite(x) for x in (*policy, *value))
    assert dirty[0].grad.isfinite().all()
    assert dirty[0].grad[0, 2] == 0


def test_trap_14_metrics_ignore_padding() -> None:
    rng = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(2, 4, generator=rng) for _ in range(3))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])

    def padded(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full((2, 6), fill)], 1)

    wide = torch.cat([mask, torch.zeros(2, 6, dtype=torch.bool)], 1)
    plain = clipped_policy_loss(new, old, advantages, mask, 0.2)
    more = clipped_policy_loss(padded(new, 5.0), padded(old, -5.0), padded(advantages, 9.0), wide, 0.2)
    for expected, actual in zip(plain, more, strict=True):
        torch.testing.assert_close(actual, expected)
    assert plain.approx_kl >= 0
