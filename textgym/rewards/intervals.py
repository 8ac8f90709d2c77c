"""95% confidence intervals over prompts, by the percentile bootstrap and by the jackknife."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""Function from indices of rows, possibly with repetitions, to the value of a metric over these rows."""


NORMAL = 1.96
"""Standard errors of a normal distribution from its mean to the ends of its 95% interval."""


@dataclass(frozen=True)
class Interval:
    """Value of a metric with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(statistic: Statistic, prompts: Sequence[Hashable], resamples: int = 200, seed: int = 0) -> Interval:
    """Return the value of a statistic over all rows, with its 95% confidence interval.

    Prompts are resampled with replacement, and all rows of a prompt come with it (cluster bootstrap: Davison and
    Hinkley, 1997, section 3.8). Rows of one prompt resemble each other. If rows were resampled, 4 prompts with 16
    samples each would count as 64 prompts, and the interval would be too narrow. If all rows have one prompt, the rows
    themselves are resampled: the interval is then that of this prompt.

    Args:
        statistic: The metric.
        prompts: The prompt of each row, or another key that rows which belong together share.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there are no rows.

    >>> scores = np.array([0.0, 0.0, 1.0, 1.0])
    >>> print(bootstrap(lambda rows: scores[rows].mean(), ["a", "a", "b", "b"]))
    0.500 [0.000, 1.000]
    """
    if not prompts:
        raise ValueError("an interval needs at least one row, and there is none")
    clusters = _rows_by(prompts)
    drawn = np.random.default_rng(seed).integers(len(clusters), size=(resamples, len(clusters)))
    values = [statistic(np.concatenate([clusters[index] for index in sample])) for sample in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(statistic(np.arange(len(prompts))), float(low), float(high))


def jackknife(statistic: Statistic, prompts: Sequence[Hashable]) -> Interval:
    """Return the value of a statistic over all rows, with its 95% confidence interval by the delete-one jackknife.

    It is for statistics that a repeated row changes, such as the share of distinct bigrams: in a bootstrap sample a
    third of the rows are repetitions, so that its values are too low and their interval often lacks the value itself.
    Here one prompt after the other is left out, with all its rows, and the standard error is
    sqrt((n - 1) / n sum_i (s_i - mean s)^2) (Efron and Stein, 1981). If all rows have one prompt, rows are left out.

    Args:
        statistic: The metric.
        prompts: The prompt of each row, or another key that rows which belong together share.

    Raises:
        ValueError: If there are no rows.

    >>> scores = np.array([0.0, 1.0, 2.0, 3.0])
    >>> print(jackknife(lambda rows: scores[rows].mean(), ["a", "b", "c", "d"]))
    1.500 [0.235, 2.765]
    """
    if not prompts:
        raise ValueError("an interval needs at least one row, and there is none")
    rows, clusters = np.arange(len(prompts)), _rows_by(prompts)
    value = statistic(rows)
    if len(clusters) == 1:
        return Interval(value, value, value)
    without = np.array([statistic(np.delete(rows, cluster)) for cluster in clusters])
    error = np.sqrt((len(clusters) - 1) * without.var())
    return Interval(value, float(value - NORMAL * error), float(value + NORMAL * error))


def _rows_by(prompts: Sequence[Hashable]) -> list[np.ndarray]:
    """Return the rows of each prompt; each row by itself if there is only one prompt."""
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    if len(rows) == 1:
        return [np.array([row]) for row in range(len(prompts))]
    return [np.array(indices) for indices in rows.values()]
