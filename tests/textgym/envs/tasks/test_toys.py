"""The tasks that need nothing: their prompts, and their rewards against cases made by hand."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import pytest

import textgym  # noqa: F401  (registers)
from textgym.envs.tasks.copying import WORDS, copied_share, copy_prompts
from textgym.envs.tasks.dates import date_share, has_date
from textgym.envs.tasks.enumerable import EOS, LENGTH, VOCAB_SIZE, table_score, texts_by_score
from textgym.envs.tasks.increasing_numbers import IncreasingNumbers
from textgym.models.loading import load_tokenizer


def play(env: Any, prompt: int, text: str) -> float:
    """Reward of an episode that writes this and stops."""
    tokenizer = env.unwrapped.task.tokenizer
    env.reset(options={"prompt_index": prompt})
    for action in [*tokenizer(text).input_ids, tokenizer.eos_token_id]:
        _, reward, terminated, *_ = env.step(action)
    assert terminated
    return float(reward)


def test_copy_pays_for_words_in_their_place() -> None:
    env = gym.make("textgym/Copy-v0", length=4, prompts=[{"prompt": "cat dog man cat |", "answer": "cat dog man cat"}])
    assert play(env, 0, " cat dog man cat") == 1.0
    assert play(env, 0, " cat man dog cat") == 0.5
    assert play(env, 0, "") == 0.0
    assert copied_share(["cat dog cat dog"], answer=["cat dog"]) == [0.5], "what is too much counts"


def test_copy_has_splits_and_words_of_one_token() -> None:
    tokenizer = load_tokenizer("tiny")
    assert all(len(tokenizer(f" {word}").input_ids) == 1 for word in WORDS)
    rows = {split: copy_prompts(5, split) for split in ("train", "validation", "test")}
    assert rows["train"] != rows["validation"] != rows["test"]
    assert all(len(row["answer"].split()) == 5 and row["prompt"] == row["answer"] + " |" for row in rows["test"])
    assert copy_prompts(5, "train") == rows["train"]
    with pytest.raises(ValueError, match="no split 'dev': use 'train'"):
        gym.make("textgym/Copy-v0", split="dev")
    with pytest.raises(ValueError, match="length must be from 1 to 14, got 15"):
        gym.make("textgym/Copy-v0", length=15)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("no number", 0.0),
        (" 4 5 6 7", 1.0),
        (" 4 5.5 6 7 8 9", 1.0),
        (" 4", 0.25),
        (" 4 5 5 6", 0.5),
        (" 1 2 or 3 and 4", 4 / 6),
        (" 9 8 7 6", 0.25),
        (" nan inf 1 2", 0.5),
        (" -3 -2 0 1e3", 1.0),
    ],
)
def test_increasing_numbers(text: str, share: float) -> None:
    assert IncreasingNumbers(min_words=4)([text]) == [pytest.approx(share)]
    assert play(gym.make("textgym/IncreasingNumbers-v0", min_words=4), 2, text) == pytest.approx(share)


def test_dates() -> None:
    texts = ["on 1999-12-31", "1999-12-32", "1999-1-1", "1999", "call 555-1234", "-", "١٩٩٩-١٢-٣١"]
    assert has_date(texts) == [1, 0, 0, 0, 0, 0, 0]
    assert date_share(texts) == [1.0, 0.9, 0.6, 0.4, 0.4, 0.0, 0.0]
    assert play(gym.make("textgym/Dates-v0"), 0, " 2024-02-29.") == 1.0


def test_enumerable_lists_every_text_once() -> None:
    scores = texts_by_score.__wrapped__()
    by_hand = set()
    for ids in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        by_hand.add(ids[: ids.index(EOS) + 1] if EOS in ids else ids)
    assert set(scores) == by_hand
    assert max(scores.values()) == 1.0
    assert sum(score * VOCAB_SIZE ** -len(text) for text, score in scores.items()) == pytest.approx(0.0)


def test_the_best_text_is_not_the_best_token_each_time() -> None:
    """Of each beginning the best end is known; a greedy choice by that mean falls short."""
    scores = texts_by_score()
    text: tuple[int, ...] = ()
    while text not in scores:
        means = {}
        for token in range(VOCAB_SIZE):
            begin = (*text, token)
            ends = [(other, score) for other, score in scores.items() if other[: len(begin)] == begin]
            means[token] = sum(score * VOCAB_SIZE ** (len(begin) - len(other)) for other, score in ends)
        text = (*text, max(means, key=lambda token: means[token]))
    assert scores[text] < 1.0


def test_enumerable_pays_its_table() -> None:
    env = gym.make("textgym/Enumerable-v0")
    for text, score in list(texts_by_score().items())[::4000]:
        env.reset(seed=0)
        for token in text:
            _, reward, terminated, *_ = env.step(token)
        assert terminated
        assert reward == pytest.approx(score)
    with pytest.raises(ValueError, match=r"tokens \[500\] are no text.*use the task's own tokenizer"):
        table_score([[500]])
