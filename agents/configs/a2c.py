"""Hyperparameters of A2C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.errors import ConfigError
from textgym.settings import Count, NotNegative, Share

from .policy_gradient import CriticConfig


@dataclass(kw_only=True)
class A2CConfig(CriticConfig):
    """Hyperparameters of A2C, which makes one optimiser step for each rollout."""

    estimator: Literal["td", "n_step", "gae", "q"] = "gae"
    """Estimator of the advantages; "q" learns Q(s, a) of all tokens and is Q(s, a) - V(s), with V the mean of Q over
    the policy."""
    n_steps: Count = 5
    """Number of rewards before bootstrapping, for the estimator "n_step"."""
    lam: Share = 0.95
    """lambda of GAE."""
    gamma: Share = 1.0
    """Discount."""
    value_coef: NotNegative = 0.5
    """Weight of the value loss."""
    whiten_advantages: bool = False
    """Normalise advantages to mean 0 and variance 1 over the response tokens of the rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs != 1 or self.minibatch_size is not None:
            raise ConfigError(
                "A2C has no importance ratios, so it can use a rollout for only one step: leave num_epochs=1 and "
                "minibatch_size=None (micro_batch_size saves memory), or use PPO"
            )
