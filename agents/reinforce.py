"""REINFORCE: the policy gradient (Williams, 1992; Sutton et al., 2000).

    textgym train --agent reinforce --output-dir runs/reinforce

    grad J = E[sum_t grad log pi(a_t | s_t) (G_t - b_t)]

G_t is the return of the whole episode, or the discounted reward from token t on, which has the same mean gradient and
less variance: what was paid before a token is not its doing. A baseline b_t that does not depend on a_t changes the
variance and not the mean: none; the mean of the other episodes' returns; or a learned value of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import Evaluation
from textgym.settings import NotNegative, Share

from .common.advantages import discounted_returns, leave_one_out_mean, masked_mean
from .common.losses import per_episode, policy_gradient_loss
from .common.on_policy import OnPolicyConfig
from .common.rollout import Rollout
from .common.surrogate import Batch, SurrogateAgent, SurrogateConfig, Targets


@dataclass
class REINFORCEConfig(SurrogateConfig):
    """The knobs of REINFORCE; one step of the optimiser for each rollout."""

    reward_to_go: bool = True
    """Credit a token with what is paid from it on; off, with the return of the whole episode."""
    gamma: Share = 1.0
    """Discount of rewards to go."""
    baseline: Literal["none", "mean", "learned"] = "mean"
    """What is taken off the returns."""
    value_coef: NotNegative = 0.5
    """Weight of the value loss, for the learned baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs != 1 or self.minibatch_size is not None:
            raise ConfigError(
                "REINFORCE has no importance ratios, so it may use a rollout for one step only: leave num_epochs=1 and "
                "minibatch_size=None (micro_batch_size saves memory), or use PPO"
            )


class REINFORCE(SurrogateAgent):
    """See the module's text and `OnPolicyAgent`."""

    config_class: ClassVar[type[OnPolicyConfig]] = REINFORCEConfig
    config: REINFORCEConfig

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """Returns less the baseline."""
        config, mask = self.config, rollout.mask
        returns = discounted_returns(rewards, mask, config.gamma)
        if not config.reward_to_go:
            returns = torch.where(mask, rewards.sum(1, keepdim=True), 0.0)
        if config.baseline == "learned":
            return Targets(torch.where(mask, returns - rollout.values, 0.0), returns)
        baseline = leave_one_out_mean(returns, mask) if config.baseline == "mean" else torch.zeros_like(returns)
        return Targets(torch.where(mask, returns - baseline, 0.0))

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy-gradient loss, and the value loss of a learned baseline."""
        config, mask = self.config, batch.mask
        policy = policy_gradient_loss(new.log_prob, batch.advantages, mask)
        entropy = per_episode(new.entropy, mask)
        loss = policy - config.entropy_coef * entropy
        figures = {"loss/policy_avg": policy, "policy/entropy_avg": masked_mean(new.entropy, mask)}
        if config.baseline == "learned":
            value = 0.5 * per_episode((new.value - batch.returns).square(), mask)
            loss, figures["loss/value_avg"] = loss + config.value_coef * value, value
        return loss, figures

    def weight(self, batch: Batch) -> int:
        """Its episodes, over which the policy gradient is a mean."""
        return len(batch)
