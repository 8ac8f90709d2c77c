"""Hyperparameters of PPO and NLPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from textgym.errors import ConfigError
from textgym.settings import Check, Count, NotNegative, Positive, PositiveShare, Share, above

from .policy_gradient import CriticConfig, KLInLoss


@dataclass(kw_only=True)
class PPOConfig(CriticConfig):
    """Hyperparameters of PPO. Coefficient and estimator of the KL to the reference are arguments of the environment."""

    num_epochs: Count = 2
    """Number of epochs over each rollout."""
    minibatch_size: Count | None = 32
    """Episodes in a minibatch."""
    gamma: Share = 1.0
    """Discount; below 1 it favours short texts."""
    lam: Share = 0.95
    """lambda of GAE."""
    critic_lam: Share | None = None
    """lambda of the critic's targets: 1 for Monte-Carlo returns, 0 for one-step TD targets; None for `lam`."""
    variant: Literal["clip", "penalty"] = "clip"
    """Limit of an update's size: "clip" clips the probability ratio, "penalty" penalises KL(old, new)."""
    clip_range: Positive = 0.2
    """Clip the ratio to [1 - clip_range, 1 + clip_range]."""
    clip_range_high: Positive | None = None
    """Another clip range above 1; None for `clip_range`."""
    dual_clip: Annotated[float, above(1)] | None = None
    """For negative advantages, bound the objective from below by this factor times the advantage; above 1."""
    clip_range_value: Positive | None = 0.2
    """Clip the change of values in an update to this range in the value loss, in standard deviations of the returns
    with `normalise_values`; None for no clipping."""
    kl_min: NotNegative = 0.003
    """For "penalty": below this KL(old, new), in nats per token, the coefficient is halved."""
    kl_max: NotNegative = 0.015
    """For "penalty": above this KL(old, new), in nats per token, the coefficient is doubled."""
    penalty_coef: NotNegative = 1.0
    """For "penalty": the initial coefficient."""
    value_coef: NotNegative = 0.1
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Normalise advantages to mean 0 and variance 1 over the response tokens of the rollout."""
    whiten_rewards: bool = False
    """Normalise token rewards to variance 1, without changing their mean."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is part of the reward or of the loss. In the loss beta is relative to advantages of
    variance 1 if they are whitened."""
    kl_gradient: KLInLoss = "token"
    """Gradient of a KL in the loss: "token" is that of the KL of each state, and no token pays for what follows it;
    "sequence" is that of the KL of whole texts; "k3" is that of k3 alone."""
    ptx_data: Annotated[str, Check("the path of a .jsonl file", lambda path: path.endswith(".jsonl"))] | None = None
    """Pretraining texts whose likelihood is part of the loss (PPO-ptx); a .jsonl file of rows with "text", or with
    "prompt" and "completion"."""
    ptx_coef: Positive = 1.0
    """Weight of the mean negative log-likelihood of `ptx_data`, in nats per token."""
    ptx_batch_size: Count = 8
    """Texts of `ptx_data` in an optimiser step, over all processes."""
    ptx_max_length: Count = 512
    """Maximum number of tokens of a text of `ptx_data`."""
    importance_cap: Positive | None = None
    """Compute the log-probs of a rollout again, and correct for the sampler's by importance weights up to this; for
    engines whose log-probs are not those of the trainer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_min < self.kl_max:
            raise ConfigError(f"kl_min must be below kl_max={self.kl_max}, got {self.kl_min}")


@dataclass(kw_only=True)
class NLPOConfig(PPOConfig):
    """Hyperparameters of NLPO."""

    top_p: PositiveShare = 0.9
    """Minimum total probability of the allowed tokens under the masking policy; 1 allows every token, which is PPO."""
    min_tokens_to_keep: Count = 1
    """Minimum number of allowed tokens."""
    mask_update_interval: Count | None = 20
    """Number of updates between refreshes of the masking policy; None keeps the first one."""
