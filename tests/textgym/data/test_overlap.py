"""Rows that belong together are found: the same prompt up to case and punctuation, the same group, the same text."""

from __future__ import annotations

from typing import Any

import pytest

from textgym.data.corpora.splits import SPLITS, in_split, split_of, splits_of
from textgym.data.overlap import clusters, clusters_of_pairs, common_beginning, key_of_prompt, key_of_text


def together(pairs: list[dict[str, Any]]) -> list[list[int]]:
    return sorted(sorted(cluster) for cluster in clusters_of_pairs(pairs))


def pair(prompt: Any, chosen: Any = "a", rejected: Any = "b", **keys: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **keys}


def test_prompts_are_compared_by_their_words() -> None:
    assert key_of_text("It's  GOOD!") == key_of_text("it's good")
    assert key_of_text("1,000") != key_of_text("1000")
    assert key_of_text("?!") != key_of_text("!!"), "there are no words to compare"
    asked = [{"role": "user", "content": "Hi!"}]
    assert (
        key_of_prompt(asked)
        == key_of_prompt([{"role": "system", "content": "Be brief."}, *asked])
        == key_of_prompt("hi")
    )


def test_what_pairs_share() -> None:
    assert together([pair("Hi!"), pair("Ho!"), pair("hi")]) == [[0, 2], [1]]
    assert together([pair("a", group=1), pair("b", group=1), pair("c", group=2)]) == [[0, 1], [2]]
    assert together([pair(None, "x y", "z"), pair(None, "w", "X, y!"), pair(None, "v", "u")]) == [[0, 1], [2]]


def test_an_implicit_prompt_ends_with_a_sentence() -> None:
    assert common_beginning("Is it? Yes it is.", "Is it? Yes it was.") == "Is it?"
    assert together([pair(None, "Is it? Yes, a", "Is it? Yes, b"), pair(None, "Is it? Maybe", "Is it? No")]) == [[0, 1]]
    first = pair(None, "Tell me about cats they purr", "Tell me about cats they run")
    second = pair(None, "Tell me about cats well", "Tell me about cats fine")
    assert together([first, second, pair(None, "Tell me about dogs a", "Tell me about dogs b")]) == [[0, 1], [2]]


def test_clusters_are_those_of_shared_keys_by_any_way() -> None:
    assert clusters([["a"], ["b", "c"], [], ["c", "d"], ["d", "a"]]) == [[0, 1, 3, 4], [2]]


def test_rows_with_one_key_are_in_one_split_and_others_stay_where_they_were() -> None:
    texts = [f"text number {index}" for index in range(200)]
    shouted = [f"{text.upper()} !" for text in texts[:50]]
    rows = [{"prompt": text} for text in [*texts, *shouted]]
    found = {split: {key_of_text(row["prompt"]) for row in in_split(rows, split)} for split in SPLITS}
    assert sum(map(len, found.values())) == 200
    alone = splits_of(texts, [[text] for text in texts])
    assert alone == [split_of(text) for text in texts]


@pytest.mark.slow
@pytest.mark.data
def test_no_test_prompt_of_the_snippets_is_in_another_split() -> None:
    from textgym.data.prompts import snippet_prompts

    keys = {
        split: {key_of_text(row["prompt"]) for row in snippet_prompts(split)} for split in ("train", "policy", "test")
    }
    assert keys["test"]
    assert not keys["test"] & (keys["train"] | keys["policy"])
