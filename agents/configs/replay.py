"""Hyperparameters of all agents with a replay buffer."""

from __future__ import annotations

from dataclasses import dataclass

from textgym.errors import ConfigError
from textgym.settings import Count, Positive, PositiveShare, Share, WholeNumber

from .rollout import RolloutAgentConfig


@dataclass(kw_only=True)
class ReplayConfig(RolloutAgentConfig):
    """Hyperparameters of all agents with a replay buffer."""

    episodes_per_update: Count = 64
    """Episodes collected before each update, over all processes. If the number of rows does not divide it, some rows of
    the last round are generated and scored, and not used."""
    gradient_steps: Count = 4
    """Number of optimiser steps in an update."""
    batch_size: Count = 64
    """Episodes sampled from the replay buffer for each optimiser step."""
    micro_batch_size: Count | None = None
    """Episodes in one forward pass; the gradients add up to that of the batch. None for the whole batch."""
    buffer_size: Count = 8192
    """Maximum number of episodes in the replay buffer; new episodes replace the oldest."""
    learning_starts: WholeNumber = 256
    """Number of episodes before the first optimiser step."""
    gamma: Share = 1.0
    """Discount."""
    n_steps: Count = 1
    """Number of rewards before bootstrapping; with more a score at the end reaches earlier tokens sooner."""
    tau: PositiveShare = 1.0
    """Weight of the trained networks in an update of the target networks; 1 copies them."""
    target_update_interval: Count = 16
    """Optimiser steps between updates of the target networks."""
    epsilon_start: Share = 1.0
    """Initial share of tokens that are sampled from the reference."""
    epsilon_end: Share = 0.05
    """Final share of tokens that are sampled from the reference."""
    epsilon_fraction: Share = 0.5
    """Share of the episodes over which epsilon decreases linearly."""
    exploration_temperature: Positive = 1.0
    """Temperature of the reference in exploration; values above 1 are closer to uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer_size < self.episodes_per_update:
            raise ConfigError(
                f"buffer_size must be at least episodes_per_update={self.episodes_per_update}, got {self.buffer_size}: "
                "new episodes would replace each other before the agent learns from them"
            )
