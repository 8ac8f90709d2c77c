"""Intervals of repeated samples cover as often as they say, which those that resample rows do not."""

from __future__ import annotations

import numpy as np
import pytest

from textgym.rewards.intervals import bootstrap, jackknife

PROMPTS, SAMPLES, DATA_SETS = 30, 8, 100


def coverage(clusters: np.ndarray) -> float:
    """Return the share of data sets whose interval holds the true mean, 0; rows of one prompt share its difficulty."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(DATA_SETS):
        scores = np.repeat(rng.normal(size=PROMPTS), SAMPLES) + 0.3 * rng.normal(size=PROMPTS * SAMPLES)
        interval = bootstrap(lambda rows, scores=scores: float(scores[rows].mean()), clusters.tolist(), resamples=60)
        covered += interval.low <= 0 <= interval.high
    return covered / DATA_SETS


def test_intervals_over_prompts_cover_the_truth() -> None:
    """With a standard error of 0.03: 95% less what the percentiles of 30 clusters and 60 resamples lose."""
    rows = np.arange(PROMPTS * SAMPLES)
    assert coverage(rows // SAMPLES) > 0.8
    assert coverage(rows) < 0.7, "rows counted as prompts"


def test_rows_of_one_prompt_are_resampled_themselves() -> None:
    scores = np.arange(8.0)
    one = bootstrap(lambda rows: float(scores[rows].mean()), ["same"] * 8)
    apart = bootstrap(lambda rows: float(scores[rows].mean()), list(range(8)))
    assert one == apart
    assert one.low < one.value < one.high


def test_prompts_of_different_sizes_keep_their_rows_together() -> None:
    """The statistic sees whole prompts: 3 rows of "a" for each row of "b"."""
    prompts = ["a", "b", "a", "a"]
    seen: list[np.ndarray] = []
    bootstrap(lambda rows: seen.append(rows) or 0.0, prompts, resamples=20)  # type: ignore[func-returns-value]
    counts = [np.bincount(rows, minlength=4) for rows in seen[:-1]]
    assert all(count[0] == count[2] == count[3] for count in counts)
    assert {int(count[0]) for count in counts} == {0, 1, 2}
    assert seen[-1].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap(lambda rows: 0.0, [])


def test_the_jackknife_of_a_mean_is_its_standard_error_over_prompts() -> None:
    scores = np.random.default_rng(0).normal(size=12)
    prompts = np.repeat(np.arange(6), 2)
    error = scores.reshape(6, 2).mean(1).std(ddof=1) / np.sqrt(6)
    found = jackknife(lambda rows: float(scores[rows].mean()), prompts.tolist())
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error))
    with pytest.raises(ValueError, match="at least one row"):
        jackknife(lambda rows: 0.0, [])
    assert jackknife(lambda rows: 2.0, ["a"]).low == 2.0


def test_the_jackknife_of_distinct_words_holds_the_truth_where_the_bootstrap_lacks_the_value_itself() -> None:
    """Rows that a bootstrap sample repeats add no distinct words."""
    chances = 1 / np.arange(1, 201)
    rng = np.random.default_rng(0)
    samples = [rng.choice(200, size=(40, 12), p=chances / chances.sum()) for _ in range(40)]

    def share(words: np.ndarray) -> float:
        return len(np.unique(words)) / words.size

    truth = np.mean([share(words) for words in samples])
    found = [jackknife(lambda rows, words=words: share(words[rows]), range(40)) for words in samples]  # type: ignore[misc]
    assert sum(interval.low < truth < interval.high for interval in found) >= 35
    assert np.mean([interval.high - interval.low for interval in found]) < 0.1
    wrong = bootstrap(lambda rows: share(samples[0][rows]), range(40))
    assert not wrong.low < wrong.value < wrong.high
