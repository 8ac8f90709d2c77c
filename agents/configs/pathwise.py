"""Hyperparameters of the pathwise derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.settings import Positive

from .replay import ReplayConfig


@dataclass(kw_only=True)
class PathwiseConfig(ReplayConfig):
    """Hyperparameters of the pathwise derivative; beta is `kl_coef` of the environment."""

    relaxation: Literal["straight_through", "gumbel"] = "straight_through"
    """Input of the critic: "straight_through" is a token with the relaxed token's derivative, "gumbel" is relaxed."""
    relaxation_temperature: Positive = 1.0
    """Temperature tau of the relaxation; low values have less bias, high values less vanishing gradients."""
    q_scale: float = 1.0
    """Initial scale of the language model's log-probs in Q, in reward per nat."""
