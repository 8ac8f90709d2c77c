"""textgym/SentimentMLP-v0: the Sentiment task for agents with small networks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from textgym.envs.tasks.sentiment import SentimentEnv, SentimentVectorEnv
from textgym.wrappers.hidden_state import HiddenStateObservation, VectorHiddenStateObservation
from textgym.wrappers.top_k import TopKActions, VectorTopKActions


def sentiment_mlp(k: int = 32, **kwargs: Any) -> gym.Env[Any, Any]:
    """Return `textgym/Sentiment-v0` with `HiddenStateObservation` and `TopKActions`.

    ## Description Continue a movie review, as in `SentimentEnv`. The agent observes the hidden state of the frozen
    reference and chooses among the reference's most likely tokens.

    ## Action Space
    `Discrete(32)`: the i-th most likely token.

    ## Observation Space
    `Box(-inf, inf, (192,), float32)`: the reference's last hidden state.

    ## Rewards
    As in `SentimentEnv`. The environment applies the KL penalty (`kl_mode="reference"`).

    ## Starting State, Episode End
    As in `SentimentEnv`.

    ## Arguments
    Args:
        k: Number of actions.
        kwargs: Arguments of `SentimentEnv`.

    >>> import gymnasium as gym, textgym
    >>> env = gym.make("textgym/SentimentMLP-v0")
    >>> env.observation_space, env.action_space
    (Box(-inf, inf, (192,), float32), Discrete(32))
    """
    return TopKActions(HiddenStateObservation(SentimentEnv(**kwargs)), k)


def sentiment_mlp_vector(num_envs: int, k: int = 32, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
    """Return the vector version of `sentiment_mlp`, with arguments of `TextVectorEnv`."""
    return VectorTopKActions(VectorHiddenStateObservation(SentimentVectorEnv(num_envs, **kwargs)), k)
