"""textgym/SentimentMLP-v0: the Sentiment task in the spaces that agents with small networks take."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from textgym.envs.tasks.sentiment import SentimentEnv, SentimentVectorEnv
from textgym.wrappers.hidden_state import HiddenStateObservation, VectorHiddenStateObservation
from textgym.wrappers.top_k import TopKActions, VectorTopKActions


def sentiment_mlp(k: int = 32, **kwargs: Any) -> gym.Env[Any, Any]:
    """`textgym/Sentiment-v0` through `HiddenStateObservation` and `TopKActions`.

    ## Description
    Continue a movie review, see `SentimentEnv`. The reference, which is frozen, reads the text and proposes tokens; the
    agent reads its hidden state and chooses.

    ## Action Space
    `Discrete(32)`: the i-th most likely token.

    ## Observation Space
    `Box(-inf, inf, (192,), float32)`: the reference's last hidden state.

    ## Rewards
    As `SentimentEnv`. The environment pays the KL (`kl_mode="reference"`).

    ## Starting State, Episode End
    As `SentimentEnv`.

    ## Arguments
    Args:
        k: number of actions.
        kwargs: as `SentimentEnv`.

    >>> import gymnasium as gym, textgym
    >>> env = gym.make("textgym/SentimentMLP-v0")
    >>> env.observation_space, env.action_space
    (Box(-inf, inf, (192,), float32), Discrete(32))
    """
    return TopKActions(HiddenStateObservation(SentimentEnv(**kwargs)), k)


def sentiment_mlp_vector(num_envs: int, k: int = 32, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
    """Many rows of `sentiment_mlp`, see there; arguments as `TextVectorEnv`."""
    return VectorTopKActions(VectorHiddenStateObservation(SentimentVectorEnv(num_envs, **kwargs)), k)
