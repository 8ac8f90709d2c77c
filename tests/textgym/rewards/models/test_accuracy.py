"""Accuracy and its interval: ties count half, and pairs that share a prompt or text are no independent ones."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest

from textgym.rewards.models import Accuracy, pairwise_accuracy
from textgym.rewards.models.accuracy import effective_number


def test_a_tie_counts_half() -> None:
    pairs = [{"prompt": f"p{i}", "chosen": text, "rejected": "bb"} for i, text in enumerate(["a", "bb", "ccc"])]
    accuracy = pairwise_accuracy(lambda completions, **_: [float(len(text)) for text in completions], pairs)
    assert accuracy == 0.5
    assert accuracy.num_pairs == 3
    assert str(accuracy).startswith("0.500 (3 pairs, 95% interval ")


def test_independent_pairs_have_wilsons_interval() -> None:
    accuracy = Accuracy.of(np.array([1.0] * 8 + [0.0] * 2), [[index] for index in range(10)])
    # Wilson (1927), by hand: (8 + z^2 / 2 +- z sqrt(1.6 + z^2 / 4)) / (10 + z^2).
    assert (accuracy.low, accuracy.high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    texts = [[2 * index, 2 * index + 1] for index in range(10)]
    assert Accuracy.of(np.array([1.0] * 8 + [0.0] * 2), texts).low == pytest.approx(accuracy.low)


def test_copies_of_a_prompt_add_no_certainty() -> None:
    right = np.array([1.0, 1.0, 1.0, 0.0])
    once = Accuracy.of(right, [[index] for index in range(4)])
    often = Accuracy.of(np.repeat(right, 16), [[index] for index in np.repeat(range(4), 16).tolist()])
    assert often == once
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))
    all_right = Accuracy.of(np.ones(64), [[index] for index in np.repeat(range(4), 16).tolist()])
    assert all_right.low == pytest.approx(Accuracy.of(np.ones(4), [[index] for index in range(4)]).low)


def test_pairs_of_few_texts_are_worth_less_than_their_number() -> None:
    """The variance over draws of the texts, which the formula has to give from a single draw."""
    estimates, true = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        quality = rng.normal(size=12)
        first, second = rng.integers(12, size=(2, 100))
        chosen, rejected = first[first != second], second[first != second]
        right = (quality[chosen] + quality[rejected] > 0).astype(float)
        units = [list(pair) for pair in zip(chosen.tolist(), rejected.tolist(), strict=True)]
        share = right.mean()
        estimates.append(share * (1 - share) / effective_number(right, units))
        true.append(share)
    assert np.mean(estimates) == pytest.approx(np.var(true), rel=0.5)
    assert np.mean(estimates) > 3 * 0.25 / 100


def test_each_pair_needs_its_units() -> None:
    with pytest.raises(ValueError, match="zip"):
        effective_number(np.array([1.0, 0.0, 1.0]), [[0], [1]])


def test_it_is_a_float_that_can_be_copied_and_written() -> None:
    accuracy = Accuracy.of(np.array([1.0, 0.0, 1.0]), [[0], [1], [2]])
    for other in (copy.deepcopy(accuracy), pickle.loads(pickle.dumps(accuracy))):
        assert (other, other.num_pairs, other.low, other.high) == (accuracy, 3, accuracy.low, accuracy.high)
    assert json.loads(json.dumps({"accuracy": accuracy})) == {"accuracy": 2 / 3}
    assert math.isnan(Accuracy.of(np.array([]), []))
