"""Preference pairs from ratings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from textgym.data.corpora.sources import Snippet
from textgym.data.preferences import heldout_pairs, load_preferences, make_preferences

SNIPPETS = [Snippet(f"text {index}", rating=(index * 7 % 20) / 2.5 - 4) for index in range(20)]


def test_a_pair_has_the_higher_rated_text_as_chosen() -> None:
    rating = {snippet.text: snippet.rating for snippet in SNIPPETS}
    pairs = make_preferences(SNIPPETS, min_gap=0.1)
    assert pairs
    for pair in pairs:
        assert set(pair) == {"chosen", "rejected", "margin", "group"}
        assert pair["margin"] == pytest.approx(rating[pair["chosen"]] - rating[pair["rejected"]])
        assert pair["margin"] >= 0.1


def test_every_round_regroups_and_large_groups_are_sampled() -> None:
    pairs = make_preferences(SNIPPETS, min_gap=0.0, group_size=8, rounds=2)
    first, second = ([p for p in pairs if (p["group"] < 3) == early] for early in (True, False))
    assert len(first) == len(second) == 2 * 28 + 6
    assert {p["chosen"] + p["rejected"] for p in first} != {p["chosen"] + p["rejected"] for p in second}
    few = make_preferences(SNIPPETS, min_gap=0.0, group_size=8, rounds=1, pairs_per_group=5)
    assert len(few) == 15
    assert all(any(pair == full for full in first) for pair in few)


def test_groups_partition_the_snippets_and_hold_all_their_comparisons() -> None:
    pairs = make_preferences(SNIPPETS, min_gap=0.0, group_size=8, rounds=1)
    texts = {
        group: {pair[side] for pair in pairs if pair["group"] == group for side in ("chosen", "rejected")}
        for group in {pair["group"] for pair in pairs}
    }
    assert sorted(map(len, texts.values())) == [4, 8, 8]
    assert len(pairs) == 6 + 28 + 28
    for one, other in itertools.combinations(texts.values(), 2):
        assert not one & other


def test_the_gap_leaves_out_what_people_would_not_agree_on() -> None:
    everything, clear = (make_preferences(SNIPPETS, min_gap=gap) for gap in (0.0, 2.0))
    assert len(clear) < len(everything)
    assert all(pair["margin"] >= 2.0 for pair in clear)


def test_pairs_depend_on_the_seed_only() -> None:
    assert make_preferences(SNIPPETS, seed=3) == make_preferences(SNIPPETS, seed=3)
    assert make_preferences(SNIPPETS, seed=3) != make_preferences(SNIPPETS, seed=4)
    assert heldout_pairs(SNIPPETS, num_pairs=50, seed=3) == heldout_pairs(SNIPPETS, num_pairs=50, seed=3)


def test_heldout_pairs_have_a_gap_above_the_minimum() -> None:
    pairs = heldout_pairs(SNIPPETS, num_pairs=100)
    assert len(pairs) == 100
    assert all(pair["margin"] > 1.0 for pair in pairs)


def test_a_text_is_never_compared_with_itself() -> None:
    doubled = [Snippet("same", -3.0), Snippet("same", 3.0), Snippet("other", 0.0)]
    for pair in make_preferences(doubled) + heldout_pairs(doubled, num_pairs=20):
        assert pair["chosen"] != pair["rejected"]


def test_what_cannot_be_compared_is_an_error_that_says_so() -> None:
    alike = [Snippet("a", 1.0), Snippet("b", 1.1)]
    with pytest.raises(ValueError, match="lower min_gap"):
        make_preferences(alike)
    with pytest.raises(ValueError, match="lower min_gap"):
        heldout_pairs(alike)
    with pytest.raises(ValueError, match="lower min_gap"):
        heldout_pairs([Snippet("same", -3.0), Snippet("same", 3.0)])
    with pytest.raises(ValueError, match="at least 2"):
        make_preferences(SNIPPETS, group_size=1)


PAIR = {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No.", "margin": 0.5}


class Dataset(list[Any]):
    """Looks like a `datasets.Dataset`."""

    column_names = tuple(PAIR)


@pytest.mark.parametrize("form", ["list", "jsonl", "dataset", "attribute"])
def test_preferences_are_read_from_anywhere(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n")
    (tmp_path / "module_of_pairs.py").write_text(f"pairs = [{PAIR!r}] * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    sources: dict[str, Any] = {
        "list": [PAIR, PAIR],
        "jsonl": str(tmp_path / "pairs.jsonl"),
        "dataset": Dataset([PAIR, PAIR]),
        "attribute": "module_of_pairs:pairs",
    }
    assert load_preferences(sources[form]) == [PAIR, PAIR]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are no preferences in a list"),
        (3, "cannot read preferences from a int"),
        ("prose", "cannot read preferences from 'prose'"),
        ([PAIR, "x"], "row 1 of the preferences is 'x'"),
        ([{"chosen": "a"}], r"row 0 of the preferences has the keys .'chosen'.: it needs"),
        ([{"chosen": "a", "rejected": 3}], "'rejected' of row 0 of the preferences is 3"),
        (
            [{**PAIR, "probability": 1.5}],
            "'probability' of row 0 of the preferences is 1.5: it must be",
        ),
    ],
)
def test_what_is_wrong_with_preferences_is_named(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_preferences(pairs)


def test_raters_make_graded_preferences() -> None:
    sure, split = Snippet("a", 3.0, (3, 3)), Snippet("b", 0.0, (-3, 3))
    pairs = make_preferences([sure, split], rounds=1)
    assert pairs[0]["probability"] == 0.75  # 3 > -3 for certain, 3 against 3 is even
    assert "probability" not in make_preferences([Snippet("a", 3.0), split], rounds=1)[0]
