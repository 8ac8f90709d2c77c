"""PreferenceReport: how good a reward model is, by how clear the preference was and by how sure the model is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from textgym.data.files import atomic_file
from textgym.data.preferences import Pair
from textgym.rewards.models.reward_model import RewardModel
from textgym.rewards.models.training import score_differences


@dataclass(frozen=True)
class Bucket:
    """Pairs that are alike in one figure.

    Attributes:
        low: the figure's lower bound.
        high: its upper bound.
        count: pairs.
        mean: the figure's mean over them.
        accuracy: share of them that the model orders as the raters did; a tie counts one half.
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
        accuracy: over all pairs.
        by_margin: by the pairs' `margin`, in buckets of equal count; empty if they have none.
        by_confidence: by the probability `sigmoid(|difference|)` that the model itself gives to its order, in tenths
            between 1/2 and 1. A calibrated model is right as often as it says.
        calibration_error: mean of `abs(confidence - accuracy)` over the pairs, by bucket.
    """

    accuracy: float
    by_margin: list[Bucket]
    by_confidence: list[Bucket]
    calibration_error: float

    @classmethod
    def of(cls, reward: Callable[..., Any], pairs: Sequence[Pair], num_buckets: int = 5) -> PreferenceReport:
        """Measures a reward function on pairs as `load_preferences` reads them.

        The gain of a `RewardModel` is taken out again: confidence is that of the scores that were trained.

        Raises:
            ValueError: no pairs.
        """
        if not pairs:
            raise ValueError("there are no pairs to measure on: give at least one")
        scale = abs(reward.gain) if isinstance(reward, RewardModel) else 1.0
        differences = score_differences(reward, pairs) / scale
        right = (differences > 0) + 0.5 * (differences == 0)
        confidence = 1 / (1 + np.exp(-np.abs(differences)))
        by_confidence = _buckets(confidence, right, np.linspace(0.5, 1.0, 6))
        margins = [pair.get("margin") for pair in pairs]
        by_margin: list[Bucket] = []
        if None not in margins:
            values = np.array(margins, dtype=float)
            by_margin = _buckets(values, right, np.quantile(values, np.linspace(0, 1, num_buckets + 1)))
        error = sum(bucket.count * abs(bucket.mean - bucket.accuracy) for bucket in by_confidence) / len(pairs)
        return cls(float(right.mean()), by_margin, by_confidence, error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture: accuracy by margin, and the calibration curve.

        Raises:
            ImportError: without matplotlib; the message is the pip line.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the picture needs matplotlib: pip install 'textgym[plots]'") from error
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
    """The pairs between one edge and the next, upper edge included; no bucket is empty."""
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
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
