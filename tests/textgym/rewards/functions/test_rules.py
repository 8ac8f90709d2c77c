"""Rewards that need nothing but the text."""

from __future__ import annotations

import pickle
import time
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest

from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.functions import rules
from textgym.rewards.functions.numbers import last_number

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


@pytest.mark.parametrize("function", [function for function in ALL if is_dataclass(function)], ids=repr)
def test_settings_are_not_changed_after_they_were_checked(function: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(function, fields(function)[0].name, -1)
    assert hash(function) == hash(replace(function))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", 42.0),
        ("-3.5 and then -4", -4.0),
        ("$1,234,567.89", 1234567.89),
        ("12,34", 34.0),
        ("1,2345", 2345.0),
        ("6.02e23 atoms", 6.02e23),
        (".5", 0.5),
        ("none, e, +, .", None),
        ("1e999", None),
        # Fractions, however they are written.
        ("7/2", 3.5),
        ("about 7 / 2.", 3.5),
        ("-7/2", -3.5),
        ("1/-2", -0.5),
        ("1.5/3", 0.5),
        (r"$\frac{7}{2}$", 3.5),
        (r"-\dfrac{1}{2}", -0.5),
        (r"3\frac{1}{2}", 3.5),
        ("3 1/2", 3.5),
        ("-3 1/2", -3.5),
        ("3 4/2", 2.0),
        ("3 2/2", 1.0),  # no mixed number: its fraction is below 1
        ("3/0", None),
        # Slashes and minus signs that are something else.
        ("11/28/2024", 2024.0),
        ("24 km/h", 24.0),
        ("10-4", 4.0),
        ("(2)-4", 4.0),
        ("1990-95", 95.0),
        ("x=-4", -4.0),
        ("\N{MINUS SIGN}4", -4.0),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric_answers_are_equal_as_numbers() -> None:
    texts = ["7/2", "0.5", "3.5", r"\frac{1}{2}", "1,000", "1/2", "2/4 "]
    answers = ["1/2", "1/2", "7/2", 0.5, 1000, 2, "0.50"]
    assert rules.NumericAnswer()(texts, answer=answers) == [0, 1, 1, 1, 1, 0, 1]
    assert rules.NumericAnswer()(["1e999", "3/0"], answer=["1e998", "4/0"]) == [0, 0], "no numbers"


@pytest.mark.parametrize("text", ["1", "1/", "1,", "1 ", "-", "1 1/", r"\frac{", r"\frac{1}", " ", r"\frac "])
def test_numbers_of_long_texts_are_found_in_no_time(text: str) -> None:
    """Matched again from every position, these would take minutes; a slow processor may need some seconds."""
    started = time.process_time()
    last_number(text * (200_000 // len(text)) + "x")
    assert time.process_time() - started < 30


def test_numeric_answer_has_a_tolerance() -> None:
    assert rules.NumericAnswer(tolerance=0.01)(["3.14"], answer=[3.1416]) == [1.0]
    assert rules.NumericAnswer()(["3.14"], answer=[3.1416]) == [0.0]
    assert rules.NumericAnswer()(["0.0000001"], answer=[0]) == [1.0]


@pytest.mark.parametrize(
    ("wanted", "near", "far"),
    [(200.5, 202.4, 202.6), (1.5, 1.514, 1.516), (0.001, 0.0109, 0.0111), (200, 200.009, 200.011), (0, 0.009, 0.011)],
)
def test_a_tolerance_of_a_hundredth_is_relative_to_decimals_and_absolute_for_whole_or_small_answers(
    wanted: float, near: float, far: float
) -> None:
    correct = rules.NumericAnswer(tolerance=0.01)
    assert correct([f"{near}", f"{far}"], answer=[wanted] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 0.01, 2.0])
@pytest.mark.parametrize(
    ("given", "wanted", "equal"),
    [
        ("1000001", 1000000, False),
        ("1,000,001", "1,000,000", False),
        ("1000001.0", 1e6, False),
        ("9007199254740993", 9007199254740992, False),
        ("9007199254740993", "9007199254740993", True),
        ("123456789012345678901234567890", "123456789012345678901234567891", False),
        ("8/2", 4, True),
        ("1e3", "1000", True),
        ("101", 100, False),
        ("-0", 0, True),
    ],
)
def test_whole_numbers_are_equal_if_they_are_the_same(
    given: str, wanted: object, equal: bool, tolerance: float
) -> None:
    assert rules.NumericAnswer(tolerance)([given], answer=[wanted]) == [float(equal)]


def test_a_decimal_is_equal_to_a_whole_answer_within_an_absolute_tolerance() -> None:
    """A relative one would take 1000000.4 for a million."""
    texts = ["1000000.4", "3.9999999", "3.99", "0.3333333", "123456.7891"]
    assert rules.NumericAnswer()(texts, answer=[1000000, 4, 4, "1/3", 123456.789]) == [0, 1, 0, 1, 1]
    assert rules.NumericAnswer()(["1e-999999999", "9" * 5000, "1e400/3"], answer=[0, 1, 1]) == [1, 0, 0]


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
