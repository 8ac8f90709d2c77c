"""Hyperparameters of RLOO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.settings import Positive

from .policy_gradient import PromptGroupConfig


@dataclass(kw_only=True)
class RLOOConfig(PromptGroupConfig):
    """Hyperparameters of RLOO."""

    normalise: Literal["none", "batch"] = "none"
    """Whether to normalise advantages to mean 0 and variance 1 over the rollout, as in REINFORCE++."""
    clip_range: Positive = 0.2
    """Clip the ratio to [1 - clip_range, 1 + clip_range]."""
