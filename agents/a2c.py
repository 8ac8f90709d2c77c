"""Advantage actor-critic, synchronous (Mnih et al., 2016).

    textgym train --agent a2c --output-dir runs/a2c

    grad J = E[sum_t grad log pi(a_t | s_t) A_t] + c grad H(pi)

A_t is estimated from a learned critic V: the error of one step, r_t + gamma V(s_{t+1}) - V(s_t); that of n steps; or
GAE, their mean with weights that fall by lambda (Schulman et al., 2016). Fewer steps trust the critic more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import Evaluation
from textgym.settings import Count, NotNegative, Share

from .common.advantages import gae, masked_mean, n_step_returns, whiten
from .common.losses import per_episode, policy_gradient_loss
from .common.on_policy import OnPolicyConfig
from .common.rollout import Rollout
from .common.surrogate import Batch, SurrogateAgent, SurrogateConfig, Targets


@dataclass
class A2CConfig(SurrogateConfig):
    """The knobs of A2C; one step of the optimiser for each rollout."""

    estimator: Literal["td", "n_step", "gae"] = "gae"
    """How advantages are estimated."""
    n_steps: Count = 5
    """Rewards that "n_step" looks ahead before it trusts the critic."""
    lam: Share = 0.95
    """GAE's lambda."""
    gamma: Share = 1.0
    """Discount."""
    value_coef: NotNegative = 0.5
    """Weight of the value loss."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the rollout's real tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs != 1 or self.minibatch_size is not None:
            raise ConfigError(
                "A2C has no importance ratios, so it may use a rollout for one step only: leave num_epochs=1 and "
                "minibatch_size=None (micro_batch_size saves memory), or use PPO"
            )


class A2C(SurrogateAgent):
    """See the module's text and `OnPolicyAgent`."""

    config_class: ClassVar[type[OnPolicyConfig]] = A2CConfig
    config: A2CConfig

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """By the estimator that was asked for."""
        config, mask, values = self.config, rollout.mask, rollout.values
        if config.estimator == "n_step":
            returns = n_step_returns(rewards, values, mask, config.gamma, config.n_steps)
            advantages = torch.where(mask, returns - values, 0.0)
        else:
            lam = config.lam if config.estimator == "gae" else 0.0
            advantages, returns = gae(rewards, values, mask, config.gamma, lam)
        return Targets(whiten(advantages, mask) if config.whiten_advantages else advantages, returns)

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy-gradient loss, value loss and entropy bonus."""
        config, mask = self.config, batch.mask
        policy = policy_gradient_loss(new.log_prob, batch.advantages, mask)
        value = 0.5 * per_episode((new.value - batch.returns).square(), mask)
        entropy = per_episode(new.entropy, mask)
        figures = {
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/entropy_avg": masked_mean(new.entropy, mask),
        }
        return policy + config.value_coef * value - config.entropy_coef * entropy, figures

    def weight(self, batch: Batch) -> int:
        """Its episodes, over which the policy gradient is a mean."""
        return len(batch)
