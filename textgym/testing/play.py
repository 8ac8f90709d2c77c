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
        scores: `(N,)` scores of the reward functions, without the KL penalty; NaN in episodes without a score.
        returns: `(N,)` sums of the rewards, which include the KL term according to `kl_mode`.
        prompts: `(N,)` indices of the prompts; `None` if each episode has a prompt of its own.
    """

    scores: np.ndarray
    returns: np.ndarray
    prompts: np.ndarray | None = None

    def __str__(self) -> str:
        """Return the mean score and its standard error."""
        return mean_and_error(self.scores, self.prompts)


def mean_and_error(values: np.ndarray, prompts: np.ndarray | None = None) -> str:
    """Format the mean of values and its standard error, with two decimals; values that are NaN are left out.

    Args:
        values: `(N,)`.
        prompts: `(N,)`, the prompt of each value. Values of one prompt resemble each other, so the error is that of
            clusters (Liang and Zeger, 1986), unless there is only one prompt. `None` for independent values.
    """
    known = ~np.isnan(values)
    prompts = np.arange(len(values)) if prompts is None or len(np.unique(prompts[known])) == 1 else prompts
    values, prompts = values[known], np.unique(prompts[known], return_inverse=True)[1]
    sums = np.bincount(prompts, values - values.mean())  # of each prompt's deviations
    error = np.sqrt(np.square(sums).sum() * len(sums) / (len(sums) - 1)) / len(values)
    return f"{values.mean():+.2f} ± {error:.2f}"


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
    scores, returns, playing = np.full(episodes, np.nan), np.zeros(episodes), np.ones(episodes, dtype=bool)
    while playing.any():
        observations, rewards, terminated, truncated, infos = envs.step(np.asarray(act(observations)))
        returns += rewards
        if "score" in infos:
            scores[infos["_score"]] = infos["score"][infos["_score"]]
        playing &= ~(terminated | truncated)
    envs.close()
    return Played(scores, returns, prompts)
