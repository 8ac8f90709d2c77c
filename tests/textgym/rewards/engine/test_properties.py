"""Properties of the reward protocol, over whatever hypothesis comes up with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textgym.models.architectures.attention import MAX_PADDING, batches_by_length
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scaling import RunningScale
from textgym.rewards.engine.scoring import RewardError, Scorer
from textgym.rewards.functions.rules import (
    DistinctN,
    NumericAnswer,
    RegexMatch,
    RepetitionPenalty,
    exact_match,
    json_valid,
)
from textgym.rewards.models.pairwise import pairwise_loss

FINITE = st.floats(-1e6, 1e6, width=32)
TEXT = st.text(max_size=20)


@st.composite
def batches(draw: st.DrawFn) -> Finished:
    count = draw(st.integers(1, 6))
    ids = st.lists(st.integers(0, 300), min_size=1, max_size=5)
    return Finished(
        draw(st.lists(TEXT, min_size=count, max_size=count)),
        draw(st.lists(TEXT, min_size=count, max_size=count)),
        draw(st.lists(ids, min_size=count, max_size=count)),
        draw(st.lists(ids, min_size=count, max_size=count)),
        {"answer": draw(st.lists(st.one_of(st.none(), st.integers(), TEXT), min_size=count, max_size=count))},
    )


def returning(values: Any) -> Any:
    def function(completions: list[str]) -> Any:
        return values

    return function


def value_for(ids: list[int]) -> st.SearchStrategy[Any]:
    """Anything that the protocol allows for a row."""
    by_token = st.lists(FINITE, min_size=len(ids), max_size=len(ids))
    return st.one_of(st.none(), st.booleans(), st.integers(-100, 100), FINITE, by_token, by_token.map(np.array))


@given(st.data(), batches(), st.lists(FINITE, min_size=2, max_size=2))
def test_the_score_is_the_weighted_sum_and_token_rewards_add_up(
    data: st.DataObject, finished: Finished, weights: list[float]
) -> None:
    values = [[data.draw(value_for(ids)) for ids in finished.completion_ids] for _ in weights]
    scores = Scorer([returning(row) for row in values], weights)(finished)
    expected = [
        sum(w * (0.0 if v is None else float(np.sum(v))) for w, v in zip(weights, column, strict=True))
        for column in zip(*values, strict=True)
    ]
    answered = [
        any(v is not None and (w != 0 or not any(weights)) for w, v in zip(weights, column, strict=True))
        for column in zip(*values, strict=True)
    ]
    assert scores.scored.tolist() == answered
    np.testing.assert_allclose(scores.raw, np.where(answered, expected, np.nan), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(scores.score, np.where(answered, expected, 0.0), rtol=1e-9, atol=1e-6)
    for component, column in zip(scores.components.values(), values, strict=True):
        assert [math.isnan(x) for x in component] == [v is None for v in column]
    assert [len(row) for row in scores.rewards] == [len(ids) for ids in finished.completion_ids]
    for row, score in zip(scores.rewards, scores.score, strict=True):
        assert math.isclose(row.sum(), score, rel_tol=1e-9, abs_tol=1e-6) or not len(row)


@given(st.data(), batches(), st.sampled_from(["penalise", "skip"]))
@pytest.mark.filterwarnings("ignore:reward function:UserWarning")
def test_nothing_that_a_function_returns_gets_through_unless_it_is_a_number(
    data: st.DataObject, finished: Finished, mode: Any
) -> None:
    bad = st.sampled_from([math.nan, math.inf, -math.inf, "1", 1j, {}, [], [None], ["a"], [1.0] * 6, object()])
    rows = [data.draw(st.one_of(FINITE, bad)) for _ in finished.completion_ids]
    wrong = [not isinstance(value, float) or not math.isfinite(value) for value in rows]
    if any(wrong):
        with pytest.raises(RewardError, match=f"row {wrong.index(True)} "):
            Scorer(returning(rows))(finished)
    scores = Scorer(returning(rows), on_error=mode)(finished)
    assert scores.errors.tolist() == [int(flag) for flag in wrong]
    assert scores.scored.tolist() == [mode == "penalise" or not flag for flag in wrong]
    instead = -1.0 if mode == "penalise" else 0.0
    np.testing.assert_allclose(scores.score, [instead if flag else v for flag, v in zip(wrong, rows, strict=True)])


@given(
    batches(), st.one_of(st.none(), st.integers(), TEXT, st.lists(FINITE, max_size=12), st.dictionaries(TEXT, FINITE))
)
def test_a_batch_of_another_length_is_refused(finished: Finished, values: Any) -> None:
    if isinstance(values, list) and len(values) == len(finished):
        values = [*values, 0.0]
    with pytest.raises(RewardError, match="must return a list of"):
        Scorer(returning(values))(finished)


@given(st.lists(st.lists(FINITE, min_size=1, max_size=9), min_size=1, max_size=6))
def test_running_scale_does_not_depend_on_how_scores_come_in_batches(batches: list[list[float]]) -> None:
    one_by_one, at_once = RunningScale("running"), RunningScale("running")
    for batch in batches:
        one_by_one(np.array(batch))
    at_once(np.concatenate([np.array(batch) for batch in batches]))
    assert one_by_one.count == at_once.count
    assert one_by_one.mean == pytest.approx(at_once.mean, rel=1e-6, abs=1e-3)
    assert one_by_one.std == pytest.approx(at_once.std, rel=1e-3, abs=1.0)


@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 64))
def test_batches_are_a_partition_with_little_padding(lengths: list[int], batch_size: int) -> None:
    batches = batches_by_length(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert len(batch) <= batch_size
        assert sum(sizes) >= (1 - MAX_PADDING) * len(sizes) * max(sizes) - 1e-9


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=8), st.floats(0, 0.5), st.floats(0, 1))
def test_pairwise_loss_is_never_negative_and_symmetric_under_the_probability(
    pairs: list[tuple[float, float]], smoothing: float, p: float
) -> None:
    chosen, rejected = (torch.tensor(side, dtype=torch.float64) / 1e4 for side in zip(*pairs, strict=True))
    probability = torch.full_like(chosen, p)
    loss = pairwise_loss(chosen, rejected, label_smoothing=smoothing, probability=probability)
    turned = pairwise_loss(rejected, chosen, label_smoothing=smoothing, probability=1 - probability)
    assert loss >= 0
    torch.testing.assert_close(loss, turned)


@given(st.lists(TEXT, max_size=5))
def test_rules_take_any_text_and_stay_in_their_bounds(completions: list[str]) -> None:
    for function in (DistinctN(), RegexMatch("a+"), json_valid):
        assert all(0.0 <= score <= 1.0 for score in function(completions))  # type: ignore[operator]
    assert all(-1.0 <= score <= 0.0 for score in RepetitionPenalty()(completions))
    assert exact_match(completions, answer=completions) == [1.0] * len(completions)
    assert all(score in (0.0, 1.0) for score in NumericAnswer()(completions, answer=completions))


@given(st.floats(-1e12, 1e12), TEXT.filter(lambda text: not any(c.isdigit() or c in ".,+-eE" for c in text)))
def test_numeric_answers_are_found_in_any_text(number: float, text: str) -> None:
    assert NumericAnswer()([f"{text} {number!r} {text}"], answer=[number]) == [1.0]
