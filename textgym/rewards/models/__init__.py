"""Learned rewards: reward models, ensembles, process reward models, and their training on preference pairs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from textgym.rewards.models.config import RewardModelConfig

if TYPE_CHECKING:
    from textgym.rewards.models.accuracy import Accuracy, pairwise_accuracy
    from textgym.rewards.models.ensemble import RewardEnsemble
    from textgym.rewards.models.pairwise import pairwise_loss
    from textgym.rewards.models.process import ProcessRewardModel
    from textgym.rewards.models.reward_model import RewardModel
    from textgym.rewards.models.training import train_reward_model

__all__ = [
    "Accuracy",
    "ProcessRewardModel",
    "RewardEnsemble",
    "RewardModel",
    "RewardModelConfig",
    "pairwise_accuracy",
    "pairwise_loss",
    "train_reward_model",
]

# Loaded on first use, so that the command line reads the config without torch.
_HOMES = {
    "Accuracy": "accuracy",
    "ProcessRewardModel": "process",
    "RewardEnsemble": "ensemble",
    "RewardModel": "reward_model",
    "pairwise_accuracy": "accuracy",
    "pairwise_loss": "pairwise",
    "train_reward_model": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
