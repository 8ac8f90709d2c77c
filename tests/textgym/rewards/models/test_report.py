"""PreferenceReport: buckets by margin and confidence, against counts by hand."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from textgym.rewards.models import RewardModel, pairwise_accuracy
from textgym.rewards.models.report import PreferenceReport


def score(completions: list[str], prompts: list[str]) -> list[float]:
    return [float(text) for text in completions]


def pair(chosen: float, rejected: float, **keys: Any) -> dict[str, Any]:
    return {"chosen": str(chosen), "rejected": str(rejected), **keys}


PAIRS = [
    pair(2, 0, margin=1.0),
    pair(0, 2, margin=1.0),  # wrong
    pair(9, 0, margin=3.0),
    pair(0, 0, margin=3.0),  # a tie
]


def test_buckets_by_hand() -> None:
    report = PreferenceReport.of(score, PAIRS, num_buckets=2)
    assert report.accuracy == (1 + 0 + 1 + 0.5) / 4
    assert [(bucket.count, bucket.mean, bucket.accuracy) for bucket in report.by_margin] == [
        (2, 1.0, 0.5),
        (2, 3.0, 0.75),
    ]
    sure = 1 / (1 + math.exp(-2))
    low, middle, high = report.by_confidence
    assert (low.count, low.mean, low.accuracy) == (1, 0.5, 0.5)
    assert (middle.count, middle.mean, middle.accuracy) == (2, pytest.approx(sure), 0.5)
    assert (high.count, high.accuracy) == (1, 1.0)
    error = (0 + 2 * (sure - 0.5) + 1 * (1 - 1 / (1 + math.exp(-9)))) / 4
    assert report.calibration_error == pytest.approx(error)


def test_the_calibration_error_is_that_of_both_orders_in_bins_from_0_to_1() -> None:
    """By the definition: P(first > second) of each pair in both orders, beside whether the first was chosen."""
    differences = [2.0, -2.0, 9.0, 0.3, 0.9, -0.1]
    pairs = [pair(difference, 0) for difference in differences]
    bins: dict[int, list[tuple[float, float]]] = {}
    for difference in differences:
        for sign, chosen in ((1, 1.0), (-1, 0.0)):
            p = 1 / (1 + math.exp(-sign * difference))
            bins.setdefault(min(int(10 * p), 9), []).append((p, chosen))
    gaps = [abs(sum(p for p, _ in members) - sum(chosen for _, chosen in members)) for members in bins.values()]
    report = PreferenceReport.of(score, pairs)
    assert report.calibration_error == pytest.approx(sum(gaps) / (2 * len(pairs)))
    assert sum(bucket.count for bucket in report.by_confidence) == report.accuracy.num_pairs == 6


def test_the_reliability_diagram_is_a_table() -> None:
    lines = list(PreferenceReport.of(score, PAIRS).lines())
    assert "calibration error of sigmoid(difference): 0.190 (n = 4)" in lines
    assert "  P(chosen > rejected) 0.8 to 0.9: mean 0.881, accuracy 0.500 of 2 pairs" in lines


def test_a_gain_changes_nothing() -> None:
    model = RewardModel.from_pretrained("tiny")
    pairs = [{"prompt": "The film is", "chosen": " a joy.", "rejected": " a mess."}]
    before = PreferenceReport.of(model, pairs)
    model.gain, model.bias = 100 * model.gain, 3.0
    after = PreferenceReport.of(model, pairs)
    model.gain = -model.gain  # it now prefers the other
    assert PreferenceReport.of(model, pairs).accuracy == 1 - after.accuracy
    assert after.by_confidence[0].mean == pytest.approx(before.by_confidence[0].mean, abs=1e-4)
    assert after.by_margin == []


def test_pairs_without_a_score_are_left_out() -> None:
    def partly(completions: list[str], prompts: list[str]) -> list[float | None]:
        return [None if text == "9" else float(text) for text in completions]

    report = PreferenceReport.of(partly, PAIRS)
    assert report.accuracy == pairwise_accuracy(partly, PAIRS) == (1 + 0 + 0.5) / 3
    assert report.accuracy.num_pairs == 3
    with pytest.raises(ValueError, match="returned None for a text of each of the 4 pairs"):
        PreferenceReport.of(lambda completions, prompts: [None] * len(completions), PAIRS)


def test_it_is_written_and_drawn(tmp_path: Path) -> None:
    report = PreferenceReport.of(score, PAIRS)
    assert json.loads(json.dumps(report.to_dict()))["accuracy"] == report.accuracy
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    with pytest.raises(ValueError, match="at least one"):
        PreferenceReport.of(score, [])


def test_what_was_measured_cannot_be_changed() -> None:
    report = PreferenceReport.of(score, PAIRS)
    for measured in (report, *report.by_confidence):
        with pytest.raises(FrozenInstanceError):
            measured.accuracy = 1.0
