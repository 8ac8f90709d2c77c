"""Accuracy of a reward function on preference pairs, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import numpy as np

from textgym.data.forms.pairs import Pair
from textgym.data.overlap import contents_of_pair
from textgym.data.preferences import load_preferences

Z = 1.959964
"""Quantile of the normal distribution for a 95% interval."""


class Accuracy(float):
    """A share of pairs, as a number that knows how sure it is.

    Attributes:
        num_pairs: Number of pairs.
        low: Lower end of the 95% interval.
        high: Upper end.

    >>> print(Accuracy.of(np.ones(20), [[pair] for pair in range(20)]))
    1.000 (20 pairs, 95% interval 0.839 to 1.000)
    """

    num_pairs: int
    low: float
    high: float

    def __new__(cls, value: float, num_pairs: int = 0, low: float = math.nan, high: float = math.nan) -> Self:
        """Make an accuracy; without pairs it is NaN."""
        accuracy = super().__new__(cls, value)
        accuracy.num_pairs, accuracy.low, accuracy.high = num_pairs, low, high
        return accuracy

    @classmethod
    def of(cls, right: np.ndarray, units: Sequence[Sequence[Hashable]]) -> Self:
        """Return the mean, with Wilson's interval for the effective number of pairs.

        Args:
            right: `(P,)`, 1 for each pair in the right order, 0 for the others, 1/2 for ties.
            units: What each pair shares with others, which makes them depend on each other: its prompt, or its texts.
        """
        if not len(right):
            return cls(math.nan)
        share, number = float(right.mean()), effective_number(right, units)
        centre = (share + Z**2 / (2 * number)) / (1 + Z**2 / number)
        half = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2)) / (1 + Z**2 / number)
        return cls(share, len(right), max(centre - half, 0.0), min(centre + half, 1.0))

    def __str__(self) -> str:
        if not self.num_pairs:
            return "unknown (no pairs were held out)"
        return f"{float(self):.3f} ({self.num_pairs:,} pairs, 95% interval {self.low:.3f} to {self.high:.3f})"


def effective_number(right: np.ndarray, units: Sequence[Sequence[Hashable]]) -> float:
    """Return how many independent pairs have a mean with the same variance.

    Pairs depend on each other if they share a unit. The variance is that of Aronow et al. (2015, "Cluster-Robust
    Variance Estimation for Dyadic Data"), which for pairs with one prompt each is that of clusters.
    """
    spread = right - right.mean()  # (P,)
    sums: dict[Hashable, float] = {}
    pairs = list(zip(spread.tolist(), units, strict=True))
    for error, shared in pairs:
        for unit in shared:
            sums[unit] = sums.get(unit, 0.0) + error
    twice = sum(error**2 * (len(shared) - 1) for error, shared in pairs)
    variance = (sum(total**2 for total in sums.values()) - twice) / len(right) ** 2

    independent = len(sums) / max(map(len, units))
    if not spread.any():  # all pairs are alike, and nothing can be said of how they depend on each other
        return min(independent, len(right))
    alone = float(np.square(spread).sum()) / len(right) ** 2
    return len(right) * min(1.0, alone / variance) if variance > 0 else float(len(right))


def pairwise_accuracy(reward: Callable[..., Any], pairs: Any) -> Accuracy:
    """Return the share of pairs whose `chosen` text has the higher score; a tie counts as one half.

    The interval takes pairs with the same prompt, or without prompts those with a text in common, as dependent. Pairs
    with a text for which the function returned `None` are left out.

    Args:
        reward: A reward function.
        pairs: Any source that `load_preferences` accepts.
    """
    pairs = load_preferences(pairs)
    return accuracy_of(score_differences(reward, pairs), pairs)


def accuracy_of(differences: np.ndarray, pairs: Sequence[Pair]) -> Accuracy:
    """Return the accuracy of the differences of scores, chosen minus rejected, `(P,)`; NaN ones are left out."""
    known = ~np.isnan(differences)
    units = [contents_of_pair(pair) for pair, is_known in zip(pairs, known, strict=True) if is_known]
    return Accuracy.of(in_order(differences[known]), units)


def in_order(differences: Any) -> Any:
    """Return 1 for each positive difference, 1/2 for each tie, and 0 for others; of an array or a tensor."""
    return 1.0 * (differences > 0) + 0.5 * (differences == 0)


def score_differences(reward: Callable[..., Any], pairs: Sequence[Pair]) -> np.ndarray:
    """Return the score of `chosen` minus that of `rejected`, `(P,)`, NaN without one; each text is scored once."""
    keys = [[json.dumps([pair.get("prompt") or "", pair[side]]) for pair in pairs] for side in ("chosen", "rejected")]
    texts = {key: json.loads(key) for key in dict.fromkeys(keys[0] + keys[1])}
    completions = [completion for _, completion in texts.values()]
    # A pair may have no separate prompt; the empty one has the same form as its completion.
    prompts = [prompt or ("" if isinstance(completion, str) else []) for prompt, completion in texts.values()]
    scores = reward(prompts=prompts, completions=completions)
    score_of = {key: math.nan if score is None else float(score) for key, score in zip(texts, scores, strict=True)}
    return np.array([score_of[chosen] - score_of[rejected] for chosen, rejected in zip(*keys, strict=True)])
