"""assert_learns: checks that agents learn, so that neither one lucky seed passes nor one unlucky seed fails.

What an agent gains depends on its seed, and a machine that rounds differently samples differently: in effect it has
another seed. So a test averages several seeds and compares the mean with a bar. How far below the usual mean the bar
must be follows from how much gains differ from seed to seed, which is measured once, over more seeds, and written in
the test. If gains are normally distributed,

    t = (mean - bar) / (deviation * sqrt(1 / seeds + 1 / runs))

has Student's distribution with `runs - 1` degrees of freedom, and its tail is the chance that a correct agent fails.
`assert_learns` computes it and refuses a bar at which the chance is above `FALSE_FAILURE`.

A test needs power too: an agent that does not learn must fail it. Measure gains exactly where that is possible
(`ExactTask.optimum(beta).gap_closed` needs no sampling), since then a policy that does not move gains exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALSE_FAILURE = 1e-4
"""The highest chance that a test of a correct agent may fail."""


@dataclass(frozen=True)
class Measured:
    """Gains of earlier runs, which show what to expect.

    Attributes:
        mean: their mean.
        deviation: their standard deviation from seed to seed.
        runs: the number of seeds.
    """

    mean: float
    standard_deviation: float
    runs: int = 20

    def chance_below(self, bar: float, seeds: int) -> float:
        """Return the chance that the mean of so many new seeds is below a bar.

        >>> f"{Measured(mean=0.9, standard_deviation=0.1, runs=20).chance_below(0.5, seeds=3):.0e}"
        '2e-06'
        """
        error = self.standard_deviation * math.sqrt(1 / seeds + 1 / self.runs)
        return t_tail((self.mean - bar) / error, self.runs - 1)


def assert_learns(gains: Sequence[float], at_least: float, measured: Measured) -> None:
    """Check the mean gain of several seeds.

    Args:
        gains: how much better each seed got; about 0 for an agent that does not learn.
        at_least: the bar, about half of the mean.
        measured: gains of other seeds of the same agent.

    Raises:
        AssertionError: the mean gain is below the bar, or the bar is so high that correct agents would often fail.

    >>> assert_learns([0.8, 0.9, 1.0], at_least=0.5, measured=Measured(mean=0.9, standard_deviation=0.1))
    """
    assert len(gains) > 1, "one seed decides nothing: average several"
    chance = measured.chance_below(at_least, len(gains))
    assert chance < FALSE_FAILURE, (
        f"the bar {at_least:g} is too near to {measured}: a correct agent fails with a chance of {chance:.0e}; lower "
        "the bar, average more seeds, or make the problem easier"
    )
    mean = sum(gains) / len(gains)
    assert mean >= at_least, f"the mean gain is {mean:.3g}, at least {at_least:g} was expected; by seed: {gains}"


def t_tail(t: float, freedom: int) -> float:
    """Return the chance that Student's t with `freedom` degrees of freedom is above `t`.

    With t = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1).

    >>> round(t_tail(2.093, 19), 4)
    0.025
    """
    return _area(math.atan(t / math.sqrt(freedom)), freedom) / _area(-math.pi / 2, freedom)


def _area(start: float, freedom: int, pieces: int = 10_000) -> float:
    """Return the integral of cos(angle)^(freedom - 1) from `start` to pi / 2, by the midpoint rule."""
    width = (math.pi / 2 - start) / pieces
    angles = start + width * (np.arange(pieces) + 0.5)
    return float((np.cos(angles) ** (freedom - 1)).sum() * width)
