"""RunningScale: scores in units of their own running standard deviation, and within bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Scaling = Literal["running", "running_std"]
SCALINGS = get_args(Scaling)
ROUNDING = 1e-7
"""A standard deviation below this share of the mean is rounding, and no difference between scores: sums of squares,
which several processes add up, are exact to its square."""


@dataclass
class RunningScale:
    """Subtracts the mean of all scores so far, divides by their standard deviation, and clips.

    Both include the scores at hand (Chan et al., 1979, for the update by batches). Until two scores differ the standard
    deviation counts as 1.

    Args:
        scaling: `"running"` takes the mean off and divides; `"running_std"` divides alone, so that 0 stays 0; `None`
            does neither.
        clip: scores are cut to -clip and clip afterwards.
        count: scores seen.
        mean: their mean.
        squares: the sum of their squared distances from it.

    >>> RunningScale("running")(np.array([1.0, 3.0]))[0]
    array([-1.,  1.])

    Raises:
        ValueError: an unknown scaling, or a clip that is not above 0.
    """

    scaling: Scaling | None = None
    clip: float | None = None
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.scaling is not None and self.scaling not in SCALINGS:
            raise ValueError(f"unknown score_scaling {self.scaling!r}; use one of {SCALINGS}, or None")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"score_clip must be above 0, got {self.clip}")

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.scaling is not None or self.clip is not None

    @property
    def std(self) -> float:
        """The standard deviation of all scores so far; 1 as long as they are all the same but for rounding."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > ROUNDING * abs(self.mean) else 1.0

    @property
    def shift(self) -> float:
        """What is taken off a score before it is divided: the mean of all scores so far, where `scaling` says so."""
        return self.mean if self.scaling == "running" else 0.0

    def __call__(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scaled scores `(N,)`, and the factors `(N,)` with which each is (score - shift) * factor.

        Token-level rewards are multiplied by the factor of their row: clipping a score shrinks all its tokens alike.
        """
        factors = np.ones(len(scores))
        if self.scaling is not None and len(scores):
            self._count(scores)
            factors /= self.std
            scores = (scores - self.shift) / self.std
        if self.clip is not None:
            clipped = np.clip(scores, -self.clip, self.clip)
            factors *= np.divide(clipped, scores, out=np.ones_like(scores), where=scores != 0)
            scores = clipped
        return scores, factors

    def moments(self) -> tuple[float, float, float]:
        """How many scores there were, their sum, and the sum of their squares: those of two lots add up."""
        return self.count, self.count * self.mean, self.squares + self.count * self.mean**2

    def take_moments(self, count: float, total: float, squares: float) -> None:
        """Goes on from these, which `moments` has given."""
        self.count, self.mean = round(count), total / max(count, 1)
        self.squares = max(squares - total * self.mean, 0.0)

    def _count(self, scores: np.ndarray) -> None:
        total = self.count + len(scores)
        origin = float(scores[0])
        mean = origin + float((scores - origin).mean())  # exactly theirs if all scores are equal
        shift = mean - self.mean
        self.squares += float(((scores - mean) ** 2).sum()) + shift**2 * self.count * len(scores) / total
        self.mean += shift * len(scores) / total
        self.count = total
