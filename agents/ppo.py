"""Proximal policy optimisation, token by token (Schulman et al., 2017; for language models: Ziegler et al., 2019).

    textgym train --env textgym/Sentiment-v0 --model tiny --total-episodes 4096 --output-dir runs/ppo

One update:
    1. Collect whole episodes with the current policy, and the log-probs they were sampled with.    rollout.py
    2. Price every token: reward - beta KL(pi, pi_ref), the score on the last token.                 textgym/rewards
    3. Advantages by GAE, whitened over real tokens.                                                 advantages.py
    4. Several epochs of minibatches of whole sequences: policy and value losses.                    losses.py

The policy's loss is the clipped surrogate or, with `variant="penalty"`, the plain one with a penalty on KL(old, new)
whose coefficient is doubled after an update that went too far and halved after one that went too short.
Every mean is over real tokens. Importance ratios start from the behaviour log-probs, so the first ratio is 1.

Advantages, returns and both losses equal those of TRL 1.12, the last with a PPO, wherever the definitions agree. They
do not in four places. The score is paid on the last token itself, EOS included, and not on the padding after it, which
that PPO also gives a value to learn. Masks come from lengths. Whitening divides by the number of tokens, not by one
less. Here the clip range may differ above 1, a dual clip bounds what a ratio loses, and values may go unclipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import Evaluation
from textgym.settings import Count, NotNegative, Share, above

from .common.advantages import gae, masked_mean, overall_mean, whiten
from .common.losses import PolicyLoss, clipped_policy_loss, clipped_value_loss, penalty_policy_loss
from .common.on_policy import Metrics, OnPolicyConfig
from .common.rollout import Rollout
from .common.surrogate import Batch, SurrogateAgent, SurrogateConfig, Targets


@dataclass
class PPOConfig(SurrogateConfig):
    """The knobs of PPO; the coefficient of the KL to the reference and its estimator are the environment's."""

    num_epochs: Count = 2
    """Passes over each rollout."""
    minibatch_size: Count | None = 32
    """Episodes in a minibatch."""
    gamma: Share = 1.0
    """Discount; text has no reason to hurry."""
    lam: Share = 0.95
    """GAE's lambda."""
    variant: Literal["clip", "penalty"] = "clip"
    """How far an update may go: "clip" ends what a ratio earns, "penalty" makes KL(old, new) cost."""
    clip_range: NotNegative = 0.2
    """The ratio earns nothing more beyond 1 - clip_range and 1 + clip_range."""
    clip_range_high: NotNegative | None = None
    """Another range above 1, if the upper bound is to differ."""
    dual_clip: Annotated[float, above(1)] | None = None
    """Above 1: where the advantage is negative no ratio loses more than this many times it."""
    clip_range_value: NotNegative | None = 0.2
    """Values move by at most this much an update before their loss stops falling; None for no limit."""
    kl_min: NotNegative = 0.003
    """Of "penalty": below this KL(old, new), in nats a token, its coefficient is halved."""
    kl_max: NotNegative = 0.015
    """Of "penalty": above this KL(old, new), in nats a token, its coefficient is doubled."""
    penalty_coef: NotNegative = 1.0
    """Of "penalty": its first coefficient."""
    value_coef: NotNegative = 0.1
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout's real tokens."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1, without moving their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_min < self.kl_max:
            raise ConfigError(f"kl_min must be below kl_max={self.kl_max}, got {self.kl_min}")


class PPO(SurrogateAgent):
    """PPO over whole episodes, see the module's text and `OnPolicyAgent`.

    >>> import gymnasium as gym
    >>> from textgym import ActorCritic
    >>> from textgym.agents import PPO, PPOConfig
    >>> envs = gym.make_vec("textgym/Sentiment-v0", num_envs=4, kl_mode="deferred", max_new_tokens=4)
    >>> agent = PPO(ActorCritic.from_pretrained("tiny"), envs, PPOConfig(episodes_per_update=4, minibatch_size=4))
    >>> agent.learn(total_episodes=8).updates
    2
    """

    config_class: ClassVar[type[OnPolicyConfig]] = PPOConfig
    config: PPOConfig

    def __init__(self, policy: Any, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        self.penalty_coef = self.config.penalty_coef

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """GAE."""
        config, mask = self.config, rollout.mask
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        return Targets(whiten(advantages, mask) if config.whiten_advantages else advantages, returns)

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy loss, value loss and entropy bonus."""
        config, mask = self.config, batch.mask
        policy = self.policy_loss(new, batch)
        value = clipped_value_loss(new.value, batch.values, batch.returns, mask, config.clip_range_value)
        entropy = masked_mean(new.entropy, mask)
        return policy.loss + config.value_coef * value.loss - config.entropy_coef * entropy, {
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction,
            "loss/policy_avg": policy.loss,
            "loss/value_avg": value.loss,
            "val/clipfrac_avg": value.clip_fraction,
            "val/ratio": policy.ratio,
            "policy/entropy_avg": entropy,
        }

    def policy_loss(self, new: Evaluation, batch: Batch) -> PolicyLoss:
        """By the variant."""
        config, old = self.config, batch.log_probs
        if config.variant == "penalty":
            return penalty_policy_loss(new.log_prob, old, batch.advantages, batch.mask, self.penalty_coef)
        ranges = (config.clip_range, config.clip_range_high, config.dual_clip)
        return clipped_policy_loss(new.log_prob, old, batch.advantages, batch.mask, *ranges)

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """An update, after which "penalty" looks at how far it went."""
        metrics = super().update(rollout, kl)
        if self.config.variant == "penalty":
            metrics["policy/penalty_coef"] = self.penalty_coef
            moved = self._distance(rollout)
            metrics["policy/kl_old_new"] = moved
            if moved > self.config.kl_max:
                self.penalty_coef *= 2
            elif moved < self.config.kl_min:
                self.penalty_coef /= 2
        return metrics

    def _distance(self, rollout: Rollout) -> float:
        """KL(old, new) of the whole update, in nats a token."""
        log_ratio = self.policy.sequence_log_probs(rollout.sequences) - rollout.log_probs
        return float(overall_mean(log_ratio.exp() - 1 - log_ratio, rollout.mask))

    def training_state(self) -> dict[str, Any]:
        """The coefficient of the penalty, besides what every agent saves."""
        return {"penalty_coef": self.penalty_coef}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `training_state` gave."""
        self.penalty_coef = state["penalty_coef"]
