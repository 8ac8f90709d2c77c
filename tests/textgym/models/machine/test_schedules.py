"""Learning rates of SFT, DPO and reward models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from textgym.models.machine.schedules import warmup_and_decay


def rates(num_updates: int, warmup: float, decay: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = warmup_and_decay(optimizer, num_updates, warmup, decay)
    found = []
    for _ in range(num_updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("decay", ["linear", "cosine", "none"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_updates", [1, 2, 3, 10])
def test_no_update_has_a_learning_rate_of_zero(num_updates: int, warmup: float, decay: str) -> None:
    found = rates(num_updates, warmup, decay)
    assert min(found) > 0
    assert max(found) == 1.0


def test_the_warmup_is_a_share_of_the_updates() -> None:
    assert rates(4, 1.0, "linear") == [0.25, 0.5, 0.75, 1.0]
    assert rates(4, 0.5, "linear") == [0.5, 1.0, 1.0, 0.5]
    assert rates(5, 0.2, "cosine") == pytest.approx([1.0, 1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])
    assert rates(3, 0.0, "none") == [1.0, 1.0, 1.0]
