"""REINFORCE: the policy gradient (Williams, 1992; Sutton et al., 2000).

    textgym train --agent reinforce --output-dir runs/reinforce

    grad J = E[sum_t grad log pi(a_t | s_t) (G_t - b_t)]

G_t is the return of the whole episode, or the discounted sum of the rewards from token t on (reward to go). Both have
the same expected gradient, and reward to go has less variance, because a token cannot change earlier rewards. A
baseline b_t that does not depend on a_t changes the variance but not the expectation. There are three: none, the mean
of the other episodes' returns, and a learned value of the state.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation

from .common.advantages import discounted_returns, leave_one_out_mean
from .common.means import masked, masked_mean, per_episode
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.reinforce import REINFORCEConfig
from .configs.rollout import RolloutAgentConfig
from .objectives.critic_agent import CriticAgent


class REINFORCE(CriticAgent):
    """REINFORCE with or without a baseline; arguments as `RolloutAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = REINFORCEConfig
    config: REINFORCEConfig

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Williams, 1992) from a rollout and the KL of its tokens."""
        config, mask = self.config, rollout.training_mask

        # 1. Rewards: the KL penalty on every token, the score and the costs of constraints on the last one.
        rewards = self.penalty.charge(self.charge_costs(rollout), kl)  # (N, T)

        # 2. Returns: from each token on, or of the whole episode for every token.
        returns = discounted_returns(rewards, mask, config.gamma)
        if not config.reward_to_go:
            returns = masked(rewards.sum(1, keepdim=True), mask)

        # 3. Advantages: returns minus a baseline that does not depend on the token.
        learned = config.baseline == "learned"
        baseline = torch.zeros_like(returns)
        if learned:  # on a scale that is fitted first (van Hasselt et al., 2016)
            rollout = self.fit_scale(rollout, returns)
            baseline = rollout.values
        elif config.baseline == "mean":
            baseline = leave_one_out_mean(returns, mask)
        advantages = masked(returns - baseline, mask)

        # 4. One optimiser step on the whole rollout: without importance ratios a second one would be biased.
        steps = [self.step(batch) for batch in self.minibatches(rollout, advantages, returns)]

        # 5. Metrics.
        further = self.explained(rollout, returns) if learned else {}
        return self.finish(steps, further)

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return -log pi (G - b) / d - c_2 H, summed over the tokens of an episode, averaged over episodes.

        It is a sum over tokens and not a mean, as in the policy gradient theorem (Sutton et al., 2000), so that long
        texts have the same weight as in the objective. A learned baseline adds c_1 / 2 ((V - G) / d)^2; then d is the
        standard deviation of the returns (`value_std`), so the unit of the rewards makes no difference. Otherwise d is
        1.
        """
        config, mask = self.config, batch.response_mask
        policy_loss = -per_episode(new.log_prob * masked(batch.advantages / self.value_std, mask), mask)
        entropy = per_episode(new.entropy, mask)
        loss = policy_loss - config.entropy_coef * entropy
        metrics = {"loss/policy_avg": policy_loss, "policy/entropy_avg": masked_mean(new.entropy, mask)}
        if config.baseline == "learned":
            error = masked(new.value - batch.returns, mask) / self.value_std
            value_loss = 0.5 * per_episode(error.square(), mask)
            loss = loss + config.value_coef * value_loss
            metrics["loss/value_avg"] = value_loss
        return loss, metrics

    def weight(self, batch: Batch) -> int:
        """Return the number of episodes, because the loss is a mean over episodes."""
        return len(batch)
