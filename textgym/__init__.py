"""textgym: token generation as a Gymnasium environment.

>>> import gymnasium as gym
>>> import textgym
>>> env = gym.make("textgym/Sentiment-v0")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
_HOMES = {
    "ActorCritic": "textgym.models.actor_critic",
    "AdaptiveKL": "textgym.rewards.kl",
    "CachedDecoder": "textgym.models.decoding.cached_decoder",
    "FixedKL": "textgym.rewards.kl",
    "HumanRatings": "textgym.rewards.human",
    "Isolated": "textgym.rewards.isolated",
    "KLPenalty": "textgym.rewards.kl",
    "RewardModel": "textgym.rewards.models",
    "SyncReference": "textgym.rewards.reference",
    "TextEnv": "textgym.envs.text",
    "TextVectorEnv": "textgym.envs.vector",
    "ThresholdKL": "textgym.rewards.kl",
    "deterministic_environment": "textgym.models.machine.determinism",
    "train_reward_model": "textgym.rewards.models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'textgym' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_environments()
