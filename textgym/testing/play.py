"""play: what any agent scores in an environment, whatever library it is from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np


@dataclass(frozen=True)
class Played:
    """Whole episodes of one agent.

    Attributes:
        scores: by the reward functions alone, without any KL, `(N,)`.
        returns: the sums of the rewards, `(N,)`: the scores and the KL term, see `kl_mode`.
    """

    scores: np.ndarray
    returns: np.ndarray

    def __str__(self) -> str:
        """Mean score, and its standard error."""
        return mean_and_error(self.scores)


def mean_and_error(values: np.ndarray) -> str:
    """The mean of values `(N,)`, and its standard error, to two places."""
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}"


def play(env_id: str, act: Callable[[Any], Any], episodes: int = 256, **env_kwargs: Any) -> Played:
    """Plays one episode in each row of a batch, on the environment's prompts in their order.

    Episodes that are short count as often as long ones, and two agents, or one before and after it was trained, get the
    same prompts.

    Args:
        env_id: a registered id.
        act: takes the observations of all rows as NumPy arrays, and returns an action for each, `(episodes,)`. Rows
            that have ended are among them; their actions are not used.
        episodes: how many, at least 2.
        env_kwargs: arguments of the environment, as of `gym.make_vec`.

    >>> import numpy as np, textgym
    >>> from textgym.testing import play
    >>> rng = np.random.default_rng(0)
    >>> played = play("textgym/SentimentMLP-v0", lambda observations: rng.integers(32, size=len(observations)), 16)
    >>> played.scores.shape, bool((played.returns < played.scores).all())  # the KL is paid
    ((16,), True)
    """
    envs: Any = gym.make_vec(env_id, num_envs=episodes, autoreset_mode="Disabled", **env_kwargs)
    prompts = np.arange(episodes) % len(envs.unwrapped.task.rows)
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
