"""Hyperparameters of GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.settings import Count, NotNegative, Positive, PositiveShare

from .policy_gradient import KLInLoss, PromptGroupConfig


@dataclass(kw_only=True)
class GRPOConfig(PromptGroupConfig):
    """Hyperparameters of GRPO. The coefficient of the KL to the reference is an argument of the environment."""

    scale: Literal["group", "none", "each"] = "group"
    """Unit of the advantages: "group" divides by the standard deviation of the group's returns, "none" does not divide,
    "each" divides each reward function by its own before they are added."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """Average of the loss: "grpo" over the tokens of each episode and then over episodes, "dr_grpo" over episodes times
    the maximum length, "dapo" over all response tokens of the minibatch, "bnpo" over those of each micro-batch."""
    clip_range: Positive = 0.2
    """Clip the ratio to [1 - clip_range, 1 + clip_range]."""
    clip_range_high: Positive | None = None
    """Another clip range above 1; DAPO's clip-higher uses 0.28. None for `clip_range`."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio: of each token, or one for all tokens of an episode, the geometric mean of their ratios."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """"clip" is PPO's; "cispo" clips the weight of each token's gradient from above and drops no token."""
    entropy_share: PositiveShare = 1.0
    """Share of the response tokens of a rollout that the policy loss is of, those with the highest entropy."""
    overlong_buffer: Count | None = None
    """Number of tokens before the maximum length in which the score falls linearly by `overlong_penalty`; at most the
    maximum length."""
    overlong_penalty: NotNegative = 1.0
    """What a response of the maximum length pays with `overlong_buffer`."""
    dynamic_sampling: Count | None = None
    """Maximum number of times to collect further groups in place of those whose scores are all equal."""
    importance_cap: Positive | None = None
    """Compute the log-probs of a rollout again, and correct for the sampler's by importance weights up to this; for
    engines whose log-probs are not those of the trainer."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is part of the reward or of the loss."""
    kl_gradient: KLInLoss = "token"
    """Gradient of a KL in the loss: "token" is that of the KL of each state, k3 times the importance ratio; "sequence"
    is that of the KL of whole texts, if `loss_type` gives all tokens one weight, as "dapo" and "dr_grpo" do, while
    "grpo" gives those of long texts less; "k3" is that of k3 alone, as published."""
