"""Questions of reasoning_gym: splits have nothing in common, and say so where that leaves few."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

import textgym  # noqa: F401  (registers)

pytest.importorskip("reasoning_gym")
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # some 200 questions in all


def make(**arguments: Any) -> Any:
    return gym.make("textgym/ReasoningGym-v0", config=SUMS, **arguments).unwrapped


def test_splits_have_no_question_in_common() -> None:
    train, test = ({row["prompt"] for row in make(size=50, split=split).task.rows} for split in ("train", "test"))
    assert len(train) > 40
    assert len(test) > 20
    assert not train & test


def test_the_verifier_pays_for_the_right_answer() -> None:
    env = make(size=10, kl_coef=0.0)
    for text, score in ((env.task.rows[3]["answer"], 1.0), ("no number", 0.0)):
        env.reset(options={"prompt_index": 3})
        for action in [*env.task.tokenizer(f" {text}").input_ids, env.task.tokenizer.eos_token_id]:
            _, reward, *_ = env.step(action)
        assert reward == pytest.approx(score, abs=0.05)


def test_a_split_that_earlier_ones_leave_little_of_says_so() -> None:
    with pytest.warns(UserWarning, match=r"only 1 of 500 questions of 'test' are not in earlier splits"):
        assert len(make(size=500, split="test").task.rows) == 1
    with pytest.raises(ValueError, match="all 2000 questions of 'test' are in earlier splits: make size smaller"):
        make(size=2000, split="test")
