"""GAE, whitening and masked means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from textgym.agents.common.advantages import (
    discounted_returns,
    gae,
    leave_one_out_mean,
    n_step_returns,
)
from textgym.agents.common.means import masked_mean, whiten
from textgym.testing import assert_close, tolerance

pytestmark = pytest.mark.numerics


def batch(seed: int = 0, pads: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 1, 3, 8])
    rewards, values = torch.randn(4, 8, generator=rng), torch.randn(4, 8, generator=rng)
    mask = torch.arange(8) < lengths[:, None]
    junk = torch.full((4, pads), 77.0)
    return (
        torch.cat([rewards, junk], 1),
        torch.cat([values, junk], 1),
        torch.cat([mask, torch.zeros(4, pads, dtype=torch.bool)], 1),
    )


def quadratic_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The definition: A_t = sum_l (gamma lam)^l delta_{t+l}, each sum written out."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        n = int(mask[row].sum())
        v = [*values[row, :n].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[row, t] = sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t))
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_its_definition(gamma: float, lam: float) -> None:
    rewards, values, mask = batch()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = quadratic_gae(rewards, values, mask, gamma, lam)
    assert_close(advantages, expected, terms=8)
    assert_close(returns, torch.where(mask, expected + values, 0.0), terms=8)


def test_lambda_zero_is_td_and_lambda_one_is_monte_carlo() -> None:
    rewards, values, mask = batch()
    rewards, values = rewards * mask, values * mask
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], 1)
    td, _ = gae(rewards, values, mask, 0.9, 0.0)
    assert_close(td, (rewards + 0.9 * following - values) * mask, terms=8)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    monte_carlo = rewards.flip(1).cumsum(1).flip(1) * mask
    assert_close(returns, monte_carlo, terms=8)


def test_padding_changes_nothing() -> None:
    plain = gae(*batch(), 0.99, 0.95)
    padded = gae(*batch(pads=5), 0.99, 0.95)
    for expected, actual in zip(plain, padded, strict=True):
        assert_close(actual[:, :8], expected, terms=8)
        assert (actual[:, 8:] == 0).all()


def test_the_score_belongs_to_eos() -> None:
    """Five tokens, the fifth is EOS, gamma 1, lambda 0.95, V = 0: A_t = 0.95^(4 - t) score."""
    score = 2.0
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, score, 0.0]])
    mask = torch.tensor([[True] * 5 + [False]])
    advantages, _ = gae(rewards, torch.zeros(1, 6), mask, 1.0, 0.95)
    expected = torch.tensor([[0.95**4, 0.95**3, 0.95**2, 0.95, 1.0, 0.0]]) * score
    assert_close(advantages, expected, terms=8)


def test_a_terminated_row_is_not_bootstrapped_and_a_truncated_one_is() -> None:
    rewards, values, mask = torch.ones(1, 3), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    _, terminated = gae(rewards, values, mask, 0.9, 1.0)
    _, truncated = gae(rewards, values, mask, 0.9, 1.0, bootstrap=torch.tensor([10.0]))
    assert_close(terminated, torch.tensor([[2.71, 1.9, 1.0]]))
    assert_close(truncated, torch.tensor([[2.71 + 7.29, 1.9 + 8.1, 1.0 + 9.0]]))


@pytest.mark.parametrize("pads", [0, 7])
def test_whitening_over_real_tokens_only(pads: int) -> None:
    rewards, _, mask = batch(pads=pads)
    whitened = whiten(rewards, mask)
    real = whitened[mask]
    assert abs(real.mean()) < tolerance(len(real), scale=2.0)
    assert abs(real.var(correction=0) - 1) < 1e-5
    assert (whitened[~mask] == 0).all()
    assert_close(whitened[:, :8], whiten(*batch()[::2]), terms=len(real))
    kept = whiten(rewards, mask, shift_mean=False)[mask]
    assert_close(kept.mean(), rewards[mask].mean(), terms=len(real), scale=2.0)


def test_degenerate_batches_are_finite() -> None:
    one = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 9.0]]), one).isfinite().all()
    assert whiten(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).isfinite().all()
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_junk_in_padding_stays_there(junk: float) -> None:
    rewards, values, mask = batch()
    expected = gae(rewards, values, mask, 0.99, 0.95)
    planted = gae(torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask, 0.99, 0.95)
    for clean, dirty in zip(expected, planted, strict=True):
        assert_close(dirty, clean, terms=8)
    assert whiten(torch.where(mask, rewards, junk), mask).isfinite().all()


REWARDS = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 99.0]])
VALUES = torch.tensor([[0.5, 1.5, 2.5], [1.0, 2.0, 99.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_discounted_returns_by_hand() -> None:
    expected = torch.tensor([[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0], [3 + 0.5 * 5, 5.0, 0.0]])
    assert_close(discounted_returns(REWARDS, MASK, 0.5), expected)


def test_n_step_returns_by_hand() -> None:
    one = torch.tensor([[1 + 0.5 * 1.5, 2 + 0.5 * 2.5, 4.0], [3 + 0.5 * 2.0, 5.0, 0.0]])
    assert_close(n_step_returns(REWARDS, VALUES, MASK, 0.5, 1), one)
    two = torch.tensor([[1 + 0.5 * 2 + 0.25 * 2.5, 2 + 0.5 * 4, 4.0], [3 + 0.5 * 5, 5.0, 0.0]])
    assert_close(n_step_returns(REWARDS, VALUES, MASK, 0.5, 2), two)


def test_n_steps_are_ends_of_gae() -> None:
    """One step is GAE with lambda 0, more steps than there are is GAE with lambda 1."""
    for n, lam in ((1, 0.0), (3, 1.0), (9, 1.0)):
        _, returns = gae(REWARDS, VALUES, MASK, 0.9, lam)
        assert_close(n_step_returns(REWARDS, VALUES, MASK, 0.9, n), returns, terms=8)


@pytest.mark.parametrize("seed", range(4))
def test_n_steps_are_the_agents_own_in_a_game(seed: int) -> None:
    """The environment writes in between: its tokens are no steps, whatever stands at them."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 12, generator=rng) < 0.5
    rewards, values = torch.randn(2, 6, 12, generator=rng)
    for n in (1, 2, 5, 12):
        found = n_step_returns(rewards, values, mask, 0.9, n)
        for row in range(6):
            own = mask[row].nonzero()[:, 0]
            if len(own):
                alone = torch.ones(1, len(own), dtype=torch.bool)
                expected = n_step_returns(rewards[row, own][None], values[row, own][None], alone, 0.9, n)
                assert_close(found[row, own], expected[0], terms=12)
        assert (found[~mask] == 0).all()
    assert_close(n_step_returns(rewards, values, mask, 0.9, 1), gae(rewards, values, mask, 0.9, 0.0)[1], terms=8)
    assert_close(n_step_returns(rewards, values, mask, 0.9, 12), gae(rewards, values, mask, 0.9, 1.0)[1], terms=24)


def test_one_step_returns_do_not_wait_for_what_the_environment_wrote() -> None:
    mask, rewards = torch.tensor([[True, False, True]]), torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[5.0, 99.0, 7.0]])
    assert n_step_returns(rewards, values, mask, 1.0, 1).tolist() == [[7.0, 0.0, 1.0]]


def test_leave_one_out_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 99.0], [8.0, 9.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    expected = torch.tensor([[(3 + 8) / 2, 5.0, 0.0], [(1 + 8) / 2, 2.0, 0.0], [(1 + 3) / 2, 0.0, 0.0]])
    assert_close(leave_one_out_mean(values, mask), expected)


def test_leave_one_out_means_are_of_the_agents_own_steps_in_a_game() -> None:
    """The second step of a row is compared with the second of the others, wherever replies have moved it."""
    values = torch.tensor([[1.0, 99.0, 2.0, 4.0], [3.0, 5.0, 99.0, 99.0], [8.0, 99.0, 99.0, 9.0]])
    mask = torch.tensor([[True, False, True, True], [True, True, False, False], [True, False, False, True]])
    expected = torch.tensor([[5.5, 0.0, 7.0, 0.0], [4.5, 5.5, 0.0, 0.0], [2.0, 0.0, 0.0, 3.5]])
    assert_close(leave_one_out_mean(values, mask), expected)
