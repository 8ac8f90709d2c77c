"""Means and shares of variance over response tokens."""

from __future__ import annotations

import pytest
import torch

from textgym.agents.common.means import explained_variance

MASK = torch.tensor([[True, True, True], [True, False, False]])
RETURNS = torch.tensor([[1.0, 2.0, 3.0], [6.0, torch.nan, torch.nan]])  # mean 3, variance 14 / 4


def share(values: list[list[float]], returns: torch.Tensor = RETURNS) -> float:
    return float(explained_variance(torch.tensor(values), returns, MASK))


def test_explained_variance_by_hand() -> None:
    nothing = torch.nan  # padding counts nowhere
    assert share([[1.0, 2.0, 3.0], [6.0, nothing, nothing]]) == 1.0
    assert share([[3.0, 3.0, 3.0], [3.0, nothing, nothing]]) == pytest.approx(0.0)
    assert share([[2.0, 2.0, 3.0], [6.0, nothing, nothing]]) == pytest.approx(1 - 1 / 14)
    assert share([[0.0, 0.0, 0.0], [0.0, nothing, nothing]]) == pytest.approx(1 - 50 / 14)


def test_explained_variance_of_equal_returns() -> None:
    """There is nothing to explain, except that the values may be exactly right."""
    equal = torch.full((2, 3), 0.1)
    assert share([[0.1] * 3, [0.1] * 3], equal) == 1.0
    assert share([[0.2] * 3, [0.1] * 3], equal) == 0.0
