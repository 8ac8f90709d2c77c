"""Agreement of raters beyond chance: Cohen's and Fleiss' kappa."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return the agreement of two raters of the same items (Cohen, 1960).

        kappa = (p - e) / (1 - e)

    with p the share of items that both put into the same category, and e this share if both chose by chance:
    the sum over categories of the product of both raters' shares. It is NaN if both put all items into one category.

    >>> cohen_kappa("aabb", "aabb"), cohen_kappa("abab", "aabb")
    (1.0, 0.0)
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][category] * counts[1][category] for category in counts[0]) / n**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(answers: Sequence[Sequence[Hashable]]) -> float:
    """Return the agreement of several raters (Fleiss, 1971).

    It is (P - E) / (1 - E), with P the mean over items of the share of pairs of raters who agree, and E the sum over
    categories of the squared share of all answers. It is NaN if all answers are in one category.

    Args:
        answers: The answers to each item, the same number of at least two each.
    """
    raters = len(answers[0])
    counts = [Counter(item) for item in answers]
    agreeing = [sum(count * (count - 1) for count in item.values()) / (raters * (raters - 1)) for item in counts]
    observed = sum(agreeing) / len(answers)
    total = sum(counts, Counter())
    expected = sum((count / (raters * len(answers))) ** 2 for count in total.values())
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)
