"""Data sets of reasoning-gym as text environments."""

from __future__ import annotations

from typing import Any

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.rewards.functions import reasoning_gym_score


def from_reasoning_gym(
    dataset: Any, tokenizer: Any = "tiny", *, num_envs: int | None = None, **kwargs: Any
) -> TextEnv | TextVectorEnv:
    """Make an environment from a data set of reasoning-gym, scored by the data set's own scorer (extra `tasks`).

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
    prompts = [{"prompt": entry["question"], "entry": entry} for entry in dataset]
    if num_envs is None:
        return TextEnv(prompts, tokenizer, reasoning_gym_score, **kwargs)
    return TextVectorEnv(num_envs, prompts, tokenizer, reasoning_gym_score, **kwargs)
