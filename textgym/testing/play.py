"""play: evaluate an agent of any library in an environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np


@dataclass(frozen=True)
class Played:
    """Results of N episodes of an agent.

    Attributes:
        scores: `(N,)` scores of the reward functions, without the KL penalty.
        returns: `(N,)` sums of the rewards, which include the KL term according to `kl_mode`.
    """

    scores: np.ndarray
    returns: np.ndarray

    def __str__(self) -> str:
        """Return the mean score and its standard error."""
        return mean_and_error(self.scores)


def mean_and_error(values: np.ndarray) -> str:
    """Format the mean of values `(N,)` and its standard error, with two decimals."""
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}"


def play(env_id: str, act: Callable[[Any], Any], episodes: int = 256, **env_kwargs: Any) -> Played:
    """Run one episode per row of a vector environment, on the prompts in their order.

    All agents get the same prompts, and each row runs exactly one episode, so short episodes are not overrepresented.

    Args:
        env_id: A registered id.
        act: Function from the observations of all rows, as NumPy arrays, to actions `(episodes,)`. Rows that have ended
            are included; their actions are ignored.
        episodes: Number of episodes, at least 2.
        env_kwargs: Arguments of the environment.

    >>> import numpy as np, textgym
    >>> from textgym.testing import play
    >>> rng = np.random.default_rng(0)
    >>> played = play("textgym/SentimentMLP-v0", lambda observations: rng.integers(32, size=len(observations)), 16)
    >>> played.scores.shape, bool((played.returns < played.scores).all())  # with the KL penalty
    ((16,), True)
    """
    envs: Any = gym.make_vec(env_id, num_envs=episodes, autoreset_mode="Disabled", **env_kwargs)
    prompts = np.arange(episodes) % len(envs.unwrapped.prompts)
    observations, _ = envs.reset(seed=0, options={"prompt_index": prompts})
    scores, returns, playing = np.zeros(episodes), np.zeros(episodes), np.ones(episodes, dtype=bool)
    while playing.any():
        observations, rewards, terminated, truncated, infos = envs.step(np.asarray(act(observations)))
        returns += rewards
        if "score" in infos:
            scores[infos["_score"]] = infos["score"][infos["_score"]]
        playing &= ~(terminated | truncated)
    envs.close()
    return Played(scores, returns)
