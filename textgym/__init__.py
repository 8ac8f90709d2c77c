"""textgym: token generation as a Gymnasium environment.

>>> import gymnasium as gym
>>> import textgym
>>> env = gym.make("textgym/Sentiment-v0")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textgym.lazy import on_first_use
from textgym.registration import register_environments

if TYPE_CHECKING:
    from textgym.envs.text import TextEnv
    from textgym.envs.vector import TextVectorEnv
    from textgym.models.actor_critic import ActorCritic
    from textgym.models.decoding.cached_decoder import CachedDecoder
    from textgym.models.machine.determinism import deterministic_environment
    from textgym.rewards.human import HumanRatings
    from textgym.rewards.isolated import Isolated
    from textgym.rewards.kl import AdaptiveKL, FixedKL, KLPenalty, ThresholdKL
    from textgym.rewards.models import RewardModel, train_reward_model
    from textgym.rewards.reference import SyncReference

__version__ = "0.1.0"
__all__ = [
    "ActorCritic",
    "AdaptiveKL",
    "CachedDecoder",
    "FixedKL",
    "HumanRatings",
    "Isolated",
    "KLPenalty",
    "RewardModel",
    "SyncReference",
    "TextEnv",
    "TextVectorEnv",
    "ThresholdKL",
    "deterministic_environment",
    "train_reward_model",
]

# Loaded on first use, so that importing textgym loads neither torch nor transformers.
__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "ActorCritic": ".models.actor_critic",
        "AdaptiveKL": ".rewards.kl",
        "CachedDecoder": ".models.decoding.cached_decoder",
        "FixedKL": ".rewards.kl",
        "HumanRatings": ".rewards.human",
        "Isolated": ".rewards.isolated",
        "KLPenalty": ".rewards.kl",
        "RewardModel": ".rewards.models",
        "SyncReference": ".rewards.reference",
        "TextEnv": ".envs.text",
        "TextVectorEnv": ".envs.vector",
        "ThresholdKL": ".rewards.kl",
        "deterministic_environment": ".models.machine.determinism",
        "train_reward_model": ".rewards.models",
    },
    folders=("agents", "data", "envs", "games", "models", "rewards", "sb3", "testing", "viewer", "wrappers"),
)


register_environments()
