"""Rewards that need nothing but the text."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.functions import rules

AWKWARD = ["", " ", "naïve 日本 \N{GRINNING FACE}", "a\n\nb\x00", "1e999", "." * 5000]
ALL: list[Any] = [
    rules.exact_match,
    rules.contains_all,
    rules.json_valid,
    rules.RegexMatch(r"\d+"),
    rules.NumericAnswer(),
    rules.LengthTarget(4),
    rules.SoftOverlong(10, 4),
    rules.DistinctN(2),
    rules.RepetitionPenalty(3),
]


@pytest.mark.parametrize("function", ALL, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_awkward_texts_are_scored(function: Any) -> None:
    """Through the scorer, which refuses NaN, infinities and wrong lengths."""
    finished = Finished(
        prompts=["p"] * len(AWKWARD),
        completions=AWKWARD,
        prompt_ids=[[1]] * len(AWKWARD),
        completion_ids=[[3]] * len(AWKWARD),
        columns={"answer": ["1"] * len(AWKWARD), "concepts": [["a", "b(", ""]] * len(AWKWARD)},
    )
    scores = Scorer(pickle.loads(pickle.dumps(function)))(finished)
    assert scores.score.shape == (len(AWKWARD),)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", 42.0),
        ("-3.5 and then -4", -4.0),
        ("$1,234,567.89", 1234567.89),
        ("12,34", 34.0),
        ("6.02e23 atoms", 6.02e23),
        (".5", 0.5),
        ("none, e, +, .", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert rules.last_number(text) == number


def test_numeric_answer_has_a_tolerance() -> None:
    assert rules.NumericAnswer(tolerance=0.01)(["3.14"], answer=[3.1416]) == [1.0]
    assert rules.NumericAnswer()(["3.14"], answer=[3.1416]) == [0.0]
    assert rules.NumericAnswer()(["0.0000001"], answer=[0]) == [1.0]


def test_words_are_matched_whole_and_in_any_case() -> None:
    assert rules.contains_all(["Cats sat"], concepts=[["cat"]]) == [0.0]
    assert rules.contains_all(["The CAT sat"], concepts=[["cat", "sat"]]) == [1.0]
    assert rules.contains_all(["anything"], concepts=[[]]) == [1.0]


def test_regex_spans_lines_and_may_have_to_match_all() -> None:
    assert rules.RegexMatch("<a>.*</a>")(["x <a>1\n2</a> y"]) == [1.0]
    assert rules.RegexMatch("<a>.*</a>", full=True)(["x <a>1\n2</a> y", "<a>\n</a>"]) == [0.0, 1.0]


def test_json_is_strict() -> None:
    assert rules.json_valid(["[1, 2]", "[1, 2] ", '{"a": NaN}', "Infinity", "{'a': 1}", ""]) == [1, 1, 0, 0, 0, 0]


def test_repetition_counts_what_comes_again() -> None:
    assert rules.RepetitionPenalty(2)(["a b a b a b", "A b a B c"]) == [pytest.approx(2 / 5 - 1), pytest.approx(-0.25)]
    assert rules.DistinctN(2)(["one"]) == [1.0]


def test_awkward_texts_and_columns() -> None:
    assert rules.NumericAnswer()(["So Apple5", "the line2", "1e3", "e5"], answer=["5", "2", 1000, "5"]) == [1.0] * 4
    assert rules.NumericAnswer()(["5"], answer=[None]) == rules.exact_match(["5"], answer=[None]) == [None]
    assert rules.exact_match([" 5"], answer=[5]) == [1.0]
    assert rules.contains_all(["I use C++ daily", "a dogma"], concepts=[["C++"], "dog"]) == [1.0, 0.0]
    assert rules.contains_all(["x"], concepts=[None]) == [None]
    assert rules.json_valid(["[" * 20_000, "[1]"]) == [0.0, 1.0]
    for broken in (
        lambda: rules.LengthTarget(0),
        lambda: rules.SoftOverlong(10, 0),
        lambda: rules.SoftOverlong(10, 11),
    ):
        with pytest.raises(ValueError, match="must be"):
            broken()
