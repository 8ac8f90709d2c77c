"""assert_learns: it passes what learns, fails what does not, and refuses bars that luck decides about."""

from __future__ import annotations

import numpy as np
import pytest

from textgym.testing import Measured, assert_learns
from textgym.testing.learning import FALSE_FAILURE, t_tail

USUAL = Measured(mean=1.0, standard_deviation=0.1, runs=20)


@pytest.mark.parametrize(("t", "freedom", "tail"), [(12.706, 1, 0.025), (2.093, 19, 0.025), (3.883, 19, 0.0005)])
def test_tail_of_students_distribution(t: float, freedom: int, tail: float) -> None:
    """Against the printed tables, on both sides."""
    assert t_tail(t, freedom) == pytest.approx(tail, rel=2e-3)
    assert t_tail(-t, freedom) == pytest.approx(1 - tail, rel=2e-3)


def test_the_chance_is_that_of_sampled_means() -> None:
    """Runs and the seeds of a test have one distribution; each bar is two deviations below the mean of its runs."""
    generator = np.random.default_rng(0)
    runs = generator.normal(1.0, 0.1, (100_000, 6))
    means = generator.normal(1.0, 0.1, (100_000, 3)).mean(1)
    bars = runs.mean(1) - 2.0 * runs.std(1, ddof=1)
    chance = Measured(mean=2.0, standard_deviation=1.0, runs=6).chance_below(0.0, seeds=3)
    assert (means < bars).mean() == pytest.approx(chance, abs=5 * (chance / 100_000) ** 0.5)


def test_what_learns_passes() -> None:
    assert_learns([0.9, 1.0, 1.1], 0.5, USUAL)


@pytest.mark.parametrize("gains", [[0.0, 0.0, 0.0], [-1.0, -1.0, 2.0], [float("nan"), 1.0, 1.0]])
def test_what_does_not_learn_fails(gains: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"at least 0\.5 was expected; by seed: "):
        assert_learns(gains, 0.5, USUAL)


def test_a_bar_that_correct_agents_often_miss_is_refused() -> None:
    assert USUAL.chance_below(0.8, 3) > FALSE_FAILURE
    with pytest.raises(AssertionError, match="lower the bar, average more seeds, or make the problem easier"):
        assert_learns([1.0, 1.0, 1.0], 0.8, USUAL)


def test_one_seed_is_refused() -> None:
    with pytest.raises(AssertionError, match="one seed decides nothing"):
        assert_learns([1.0], 0.5, USUAL)
