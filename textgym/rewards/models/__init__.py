"""Learned rewards: reward models, ensembles, process reward models, and their training on preference pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textgym.lazy import on_first_use
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
__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "Accuracy": ".accuracy",
        "ProcessRewardModel": ".process",
        "RewardEnsemble": ".ensemble",
        "RewardModel": ".reward_model",
        "pairwise_accuracy": ".accuracy",
        "pairwise_loss": ".pairwise",
        "train_reward_model": ".training",
    },
)
