"""Hyperparameters of REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.errors import ConfigError
from textgym.settings import NotNegative, Share

from .policy_gradient import CriticConfig


@dataclass(kw_only=True)
class REINFORCEConfig(CriticConfig):
    """Hyperparameters of REINFORCE, which makes one optimiser step for each rollout."""

    reward_to_go: bool = True
    """Whether the return of a token is the sum of rewards from it on; if not, it is that of the whole episode."""
    gamma: Share = 1.0
    """Discount of the reward to go."""
    baseline: Literal["none", "mean", "learned"] = "mean"
    """Baseline that is subtracted from the returns."""
    value_coef: NotNegative = 0.5
    """Weight of the value loss, for the learned baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs != 1 or self.minibatch_size is not None:
            raise ConfigError(
                "REINFORCE has no importance ratios, so it can use a rollout for only one step: leave num_epochs=1 and "
                "minibatch_size=None (micro_batch_size saves memory), or use PPO"
            )
