"""Means and shares of variance over response tokens."""

from __future__ import annotations

import math

import pytest
import torch

from textgym.agents.common.means import explained_variance, explained_variance_within_prompts

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


def share_within(values: list[list[float]], returns: list[list[float]], prompts: list[bytes]) -> float:
    """Rows of one token or two; NaN is padding."""
    targets = torch.tensor(returns)
    mask = ~targets.isnan()
    return float(explained_variance_within_prompts(torch.tensor(values), targets, mask, prompts))


def test_explained_variance_within_prompts_by_hand() -> None:
    """Two easy rows and two hard ones: returns of 9 and 11, and of -11 and -9, one token each."""
    prompts = [b"easy", b"easy", b"hard", b"hard"]
    returns = [[9.0], [11.0], [-11.0], [-9.0]]
    whole = torch.ones(4, 1, dtype=torch.bool)

    means = [[10.0], [10.0], [-10.0], [-10.0]]
    assert float(explained_variance(torch.tensor(means), torch.tensor(returns), whole)) == pytest.approx(1 - 4 / 404)
    assert share_within(means, returns, prompts) == pytest.approx(0.0)

    assert share_within(returns, returns, prompts) == 1.0
    assert share_within([[9.0], [10.0], [-11.0], [-10.0]], returns, prompts) == pytest.approx(1 - 1 / 4)
    assert share_within([[10.0], [10.0], [-11.0], [-9.0]], returns, prompts) == pytest.approx(1 - 2 / 4)
    assert share_within([[11.0], [9.0], [-9.0], [-11.0]], returns, prompts) == pytest.approx(1 - 16 / 4)


def test_an_offset_of_a_prompt_does_not_change_what_is_explained_within_it() -> None:
    prompts, returns = [b"a", b"a", b"b", b"b"], [[1.0], [3.0], [5.0], [6.0]]
    values = [[1.5], [2.5], [5.0], [5.0]]
    moved = [[101.5], [102.5], [-5.0], [-5.0]]
    assert share_within(moved, returns, prompts) == pytest.approx(share_within(values, returns, prompts))


def test_explained_variance_within_prompts_is_over_all_tokens_of_a_prompt() -> None:
    """Tokens 1, 2 and 6 have a mean of 3 and squares of 14; the errors 0, 0 and 3 have squares of 6."""
    nothing = torch.nan  # padding counts nowhere
    prompts, returns = [b"a", b"a"], [[1.0, 2.0], [6.0, nothing]]
    assert share_within([[1.0, 2.0], [3.0, nothing]], returns, prompts) == pytest.approx(1 - 6 / 14)


def test_prompts_with_one_row_and_equal_returns_have_nothing_to_explain() -> None:
    returns = [[1.0], [3.0], [5.0], [0.1], [0.1]]
    values = [[1.0], [2.0], [-90.0], [7.0], [8.0]]
    assert share_within(values, returns, [b"a", b"a", b"one row", b"c", b"d"]) == pytest.approx(1 - 0.5 / 2)
    assert math.isnan(share_within(values, returns, [b"a", b"b", b"c", b"d", b"e"]))
    assert math.isnan(share_within(values[3:], returns[3:], [b"c", b"c"]))  # although the values differ

    unscored = [[1.0], [torch.nan]]  # the second row is not trained on, so the first one is alone
    assert math.isnan(share_within([[1.0], [1.0]], unscored, [b"a", b"a"]))
