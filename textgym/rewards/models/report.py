"""PreferenceReport: accuracy of a reward model by margin of the preference, and its calibration.

A reward model says P(chosen > rejected) = sigmoid(s_chosen - s_rejected) (Bradley and Terry, 1952). The reliability
diagram compares it with the raters in bins B of equal width. Of n pairs, the expected calibration error (Guo et al.,
2017, equation 5) is::

    ECE = sum over B of (pairs in B) / n * abs(mean confidence in B - accuracy in B)

The confidence is the probability that the model gives to its own order, which is at least 1/2: counting each pair in
both orders, in bins from 0 to 1, gives the same error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from textgym.data.files import atomic_file
from textgym.data.forms.pairs import Pair
from textgym.data.preferences import load_preferences
from textgym.rewards.models.accuracy import Accuracy, accuracy_of, in_order, score_differences
from textgym.rewards.models.reward_model import RewardModel


@dataclass(frozen=True)
class Bucket:
    """Pairs with similar values of a quantity.

    Attributes:
        low: Lower bound of the values.
        high: Upper bound of the values.
        count: Number of pairs.
        mean: Mean of the values.
        accuracy: Share of the pairs that the model orders as the raters did; a tie counts as one half.
    """

    low: float
    high: float
    count: int
    mean: float
    accuracy: float


@dataclass(frozen=True)
class PreferenceReport:
    """Accuracy of a reward function on preference pairs.

    Attributes:
        accuracy: Accuracy over all pairs, a float that has the number of pairs and its interval.
        by_margin: Accuracy by the pairs' `margin`, in buckets of equal size; empty if the pairs have no margin.
        by_confidence: Accuracy by confidence, which is the probability `sigmoid(|difference|)` that the model gives to
            its own order, in buckets of width 0.1 from 0.5 to 1. The accuracy of a calibrated model equals its
            confidence.
        calibration_error: Expected calibration error, the mean of `abs(confidence - accuracy)` over the buckets,
            weighted by their size. It says something only of scores whose differences are log-odds: not of
            probabilities, nor of the "regression" loss.
    """

    accuracy: Accuracy
    by_margin: list[Bucket]
    by_confidence: list[Bucket]
    calibration_error: float

    @classmethod
    def of(cls, reward: Callable[..., Any], pairs: Sequence[Pair], num_buckets: int = 5) -> PreferenceReport:
        """Evaluate a reward function on pairs in the format of `load_preferences`.

        Pairs with a text for which the function returned `None` are left out.

        Raises:
            ValueError: If there are no pairs.
        """
        if not pairs:
            raise ValueError("there are no pairs to evaluate on: pass at least one")
        pairs = load_preferences(pairs)
        # The loss was computed on the scores before `calibrate`, so only their differences are log-odds.
        scale = abs(reward.gain) if isinstance(reward, RewardModel) else 1.0
        differences = score_differences(reward, pairs) / scale
        known = ~np.isnan(differences)
        if not known.any():
            raise ValueError(f"the function returned None for a text of each of the {len(pairs)} pairs")
        pairs = [pair for pair, is_known in zip(pairs, known, strict=True) if is_known]
        differences = differences[known]
        right = in_order(differences)
        confidence = 1 / (1 + np.exp(-np.abs(differences)))
        by_confidence = _buckets(confidence, right, np.linspace(0.5, 1.0, 6))
        margins = [pair.get("margin") for pair in pairs]
        by_margin: list[Bucket] = []
        if None not in margins:
            values = np.array(margins, dtype=float)
            by_margin = _buckets(values, right, np.quantile(values, np.linspace(0, 1, num_buckets + 1)))
        error = sum(bucket.count * abs(bucket.mean - bucket.accuracy) for bucket in by_confidence) / len(pairs)
        return cls(accuracy_of(differences, pairs), by_margin, by_confidence, error)

    def lines(self) -> Iterator[str]:
        """Yield the report as lines of text: accuracy by margin, and the reliability diagram as a table."""
        yield f"held-out pairwise accuracy: reward model {self.accuracy}"
        for bucket in self.by_margin:
            yield f"  margin {bucket.low:.2f} to {bucket.high:.2f}: {bucket.accuracy:.3f} of {bucket.count} pairs"
        count = f"n = {self.accuracy.num_pairs:,}"
        yield f"calibration error of sigmoid(difference): {self.calibration_error:.3f} ({count})"
        for bucket in self.by_confidence:
            yield (
                f"  P(chosen > rejected) {bucket.low:.1f} to {bucket.high:.1f}: mean {bucket.mean:.3f}, accuracy "
                f"{bucket.accuracy:.3f} of {bucket.count} pairs"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        interval = [self.accuracy.low, self.accuracy.high]
        return {**asdict(self), "num_pairs": self.accuracy.num_pairs, "accuracy_interval": interval}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot accuracy by margin and the calibration curve into an image file.

        Raises:
            ImportError: If matplotlib is missing; the message says how to install it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the plot needs matplotlib: pip install 'textgym[plots]'") from error
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar([f"{b.low:.1f} to {b.high:.1f}" for b in self.by_margin], [b.accuracy for b in self.by_margin])
        left.set(title="accuracy by margin", ylim=(0.0, 1.0))
        right.plot([0.5, 1.0], [0.5, 1.0], color="grey", linestyle="dotted")
        right.plot([b.mean for b in self.by_confidence], [b.accuracy for b in self.by_confidence], marker="o")
        right.set(title="calibration", xlabel="the model's confidence", ylabel="accuracy")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=110)


def _buckets(values: np.ndarray, right: np.ndarray, edges: np.ndarray) -> list[Bucket]:
    """Divide pairs at the edges, each bucket including its upper edge; empty buckets are left out."""
    place = np.maximum(np.searchsorted(edges, values, side="left") - 1, 0)  # the first one has its lower edge, too
    return [
        Bucket(
            float(edges[index]),
            float(edges[index + 1]),
            int((place == index).sum()),
            float(values[place == index].mean()),
            float(right[place == index].mean()),
        )
        for index in range(len(edges) - 1)
        if (place == index).any()
    ]
