"""Learned rewards: reward models, ensembles, process reward models, and their training on preference pairs."""

from __future__ import annotations

from textgym.rewards.models.accuracy import Accuracy, pairwise_accuracy
from textgym.rewards.models.ensemble import RewardEnsemble
from textgym.rewards.models.pairwise import RewardModelConfig, pairwise_loss
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
