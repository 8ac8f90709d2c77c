"""Data sets of reasoning-gym as text environments."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from textgym.data.messages import Text, plain
from textgym.data.rows import Row
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.rewards.functions.verifiers import score_answer


def from_reasoning_gym(
    dataset: Any, tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> TextEnv | TextVectorEnv:
    """Make an environment from a data set of reasoning-gym, scored by the data set's own scorer (extra `tasks`).

    An answer that the scorer cannot read scores 0.

    Args:
        dataset: Data set, such as `reasoning_gym.create_dataset("leg_counting", size=100, seed=0)`.
        tokenizer: Name, path or tokenizer.
        num_envs: Number of rows of a vector environment; `None` makes a single environment.
        kwargs: Arguments of `TextEnv`.

    >>> import reasoning_gym
    >>> env = from_reasoning_gym(reasoning_gym.create_dataset("chain_sum", size=3, seed=1))
    >>> observation, info = env.reset(options={"prompt_index": 0})
    >>> env.transcript["prompt"].splitlines()[0]
    'State the final answer to the following arithmetic problem: ...'
    """

    def reasoning_gym_score(completions: Sequence[Text], entry: Sequence[Mapping[str, Any]], **_: Any) -> list[float]:
        return [score_answer(dataset, text.strip(), row) for text, row in zip(plain(completions), entry, strict=True)]

    prompts = _entries(dataset)
    if num_envs is None:
        return TextEnv(prompts, tokenizer, reasoning_gym_score, **kwargs)
    return TextVectorEnv(num_envs, prompts, tokenizer, reasoning_gym_score, **kwargs)


def _entries(dataset: Any) -> list[Row]:
    """Return the questions; some data sets draw from the global generators when they make them."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        return [{"prompt": entry["question"], "entry": entry} for entry in dataset]
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
