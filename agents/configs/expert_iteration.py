"""Hyperparameters of expert iteration."""

from __future__ import annotations

from dataclasses import dataclass

from textgym.errors import ConfigError
from textgym.settings import Count

from .policy_gradient import PromptGroupConfig


@dataclass(kw_only=True)
class ExpertIterationConfig(PromptGroupConfig):
    """Hyperparameters of expert iteration."""

    keep: Count = 1
    """Number of episodes of each prompt to train on, those with the highest returns."""
    min_score: float | None = None
    """Minimum return (score minus KL penalty) of an episode to train on; None for no minimum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep > self.group_size:
            raise ConfigError(f"keep must be from 1 to group_size={self.group_size}, got {self.keep}")
