"""textgym/Copy-v0: write the words of the prompt again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.data.messages import Text, plain
from textgym.data.rows import Row
from textgym.envs.tasks.base import Settings, TaskEnv, TaskVectorEnv

WORDS = ("cat", "dog", "film", "food", "game", "love", "man", "music", "time", "world")
NUM_PROMPTS = 500
SPLITS = ("train", "validation", "test")
"""The place of a split is the seed of its prompts."""


class CopyEnv(TaskEnv):
    """Words to be written again, in their order: the toy of a task in which the prompt decides what is right.

    ## Description
    A prompt such as `"dog film cat |"` is to be answered with `" dog film cat"` and the end of the text. The words are
    ten that the embedded tokenizer writes as one token each; nothing is fetched.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 16 + length + 1`.

    ## Rewards
    On the last token the share of words that stand in their place (`copied_share`), from 0 to 1; 1 only where nothing
    follows. No reference.

    Metrics: the reward itself; `exact_match`.

    ## Starting State
    One of 500 prompts, drawn once from a seed; every split has a seed of its own.

    ## Episode End
    The end-of-text token, or `length + 1` tokens.

    ## Arguments
    Args:
        length: how many words.
        split: `"train"`, `"validation"` or `"test"`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ValueError: an unknown split, or a length that is not from 1 to 14.
    """

    metrics = ("textgym.envs.tasks.copying:copied_share", "textgym.rewards.functions:exact_match")

    @classmethod
    def settings(cls, *, length: int = 3, split: str = "train", prompts: Any = None, **kwargs: Any) -> Settings:
        """The arguments of `TextEnv`."""
        return {
            "prompts": copy_prompts(length, split) if prompts is None else prompts,
            "tokenizer": "tiny",
            "reward": copied_share,
            "max_prompt_tokens": 16,
            "max_new_tokens": length + 1,
            **kwargs,
        }


class CopyVectorEnv(TaskVectorEnv):
    """Many rows of `CopyEnv`, see there."""

    single = CopyEnv


def copied_share(completions: Sequence[Text], answer: Sequence[str], **_: Any) -> list[float]:
    """The share of words that stand where the column `answer` has them; words too many count as wrong ones.

    >>> copied_share([" cat dog", " dog", "cat dog dog dog"], answer=["cat dog"] * 3)
    [1.0, 0.0, 0.5]
    """
    return [_in_place(text.split(), wanted.split()) for text, wanted in zip(plain(completions), answer, strict=True)]


def _in_place(words: list[str], wanted: list[str]) -> float:
    right = sum(word == other for word, other in zip(words, wanted, strict=False))
    return right / max(len(words), len(wanted))


def copy_prompts(length: int, split: str) -> list[Row]:
    """Rows with `prompt` and `answer`."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: use 'train', 'validation' or 'test'")
    if not 1 <= length <= 14:
        raise ValueError(f"length must be from 1 to 14, got {length}: longer prompts would be cut")
    drawn = np.random.default_rng(SPLITS.index(split)).choice(WORDS, (NUM_PROMPTS, length))
    answers = [" ".join(words) for words in drawn]
    return [{"prompt": f"{answer} |", "answer": answer} for answer in answers]
