"""Advantage actor-critic, synchronous (Mnih et al., 2016).

    textgym train --agent a2c --output-dir runs/a2c

    grad J = E[sum_t grad log pi(a_t | s_t) A_t] + c grad H(pi)

A_t is estimated with a learned critic V: the TD error of one step, r_t + gamma V(s_{t+1}) - V(s_t); the n-step error;
or GAE, the mean of the n-step errors for all n with weights proportional to lambda^n (Schulman et al., 2016). Fewer
steps have less variance and more bias from errors of the critic.

With `estimator="q"` the critic learns Q(s, a) of every token (objectives/action_values.py) from the one-step targets of
expected SARSA (van Seijen et al., 2009), r_t + gamma V(s_{t+1}) with V(s) = sum_a pi(a | s) Q(s, a), and

    A_t = Q(s_t, a_t) - V(s_t)

which has no variance from the reward of the step or from the next state, but all of the bias of Q.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic, Evaluation

from .common.advantages import discounted_returns, gae, n_step_returns
from .common.means import masked, masked_mean, per_episode, whiten
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.a2c import A2CConfig
from .configs.rollout import RolloutAgentConfig
from .objectives.action_values import ActionValues
from .objectives.critic_agent import CriticAgent


class A2C(CriticAgent):
    """Synchronous advantage actor-critic; arguments as `RolloutAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = A2CConfig
    config: A2CConfig
    action_values: ActionValues | None = None

    def __init__(self, policy: Any, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        if self.config.estimator != "q":
            return
        if self.learner.sharded:
            raise ConfigError(
                "estimator='q' does not shard its weights: launch it with examples/accelerate/ddp.yaml, or use 'gae'"
            )
        self.action_values = ActionValues(self.policy)
        part = "policy" if self.policy.critic is None else "critic"
        settings = self.part_settings(part)
        own = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.optimizer.add_param_group({"params": [self.action_values.weight], "part": part, **own})

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Mnih et al., 2016, algorithm S3, synchronous) from a rollout and the KL of its tokens."""
        config, mask = self.config, rollout.training_mask

        # 1. Rewards: the KL penalty on every token, the score and the costs of constraints on the last one.
        rewards = self.penalty.charge(self.charge_costs(rollout), kl)  # (N, T)

        # 2. The scale of the values, fitted before they are used (van Hasselt et al., 2016).
        rollout = self.fit_scale(rollout, discounted_returns(rewards, mask, config.gamma))
        values = rollout.values

        # 3. Advantages: returns minus the critic's values.
        if self.action_values is not None:  # Q(s_t, a_t) - V(s_t), and the targets r_t + gamma V(s_{t+1}) of Q
            with torch.no_grad():
                actions, values = self.action_values.of_sequences(self.policy, rollout.sequences)
            rollout = replace(rollout, values=values)
            returns = n_step_returns(rewards, values, mask, config.gamma, 1)
            advantages = masked(actions - values, mask)
        elif config.estimator == "n_step":  # r_t + ... + gamma^n V(s_{t+n}) - V(s_t)
            returns = n_step_returns(rewards, values, mask, config.gamma, config.n_steps)
            advantages = masked(returns - values, mask)
        else:  # "td" is GAE with lambda = 0: r_t + gamma V(s_{t+1}) - V(s_t)
            lam = config.lam if config.estimator == "gae" else 0.0
            advantages, returns = gae(rewards, values, mask, config.gamma, lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)

        # 4. One optimiser step on the whole rollout: without importance ratios a second one would be biased.
        steps = [self.step(batch) for batch in self.minibatches(rollout, advantages, returns)]

        # 5. Metrics, with the explained variance of the critic before the step.
        return self.finish(steps, self.explained(rollout, returns))

    def fit_scale(self, rollout: Rollout, returns: Tensor) -> Rollout:
        """Fit the scale of the values, see `CriticAgent`; Q(s, a) - v(s) does not change either."""
        if self.action_values is None:
            return super().fit_scale(rollout, returns)
        self.actions_before = self.action_values.weight.detach().clone()
        std = self.policy.value_head.std.clone()
        rollout = super().fit_scale(rollout, returns)
        with torch.no_grad():
            self.action_values.weight.mul_(std / self.policy.value_head.std)
        return rollout

    def restore_scale(self) -> None:
        """Restore the scale of before the update, and the weights of Q with it."""
        super().restore_scale()
        if self.action_values is not None:
            with torch.no_grad():
                self.action_values.weight.copy_(self.actions_before)

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return -log pi A / d + c_1 / 2 ((V - R) / d)^2 - c_2 H, summed over tokens, averaged over episodes.

        With the standard deviation d of the returns (`value_std`), neither the size of the gradient, which is clipped,
        nor the shares of policy and critic in it depend on the unit of the rewards. Whitened advantages have no unit.

        It is a sum over tokens and not a mean, as in the policy gradient theorem (Sutton et al., 2000), so that long
        texts have the same weight as in the objective.
        """
        config, mask = self.config, batch.response_mask
        unit = 1.0 if config.whiten_advantages else self.value_std  # of the advantages
        policy_loss = -per_episode(new.log_prob * masked(batch.advantages / unit, mask), mask)
        error = masked(new.value - batch.returns, mask) / self.value_std
        value_loss = 0.5 * per_episode(error.square(), mask)
        entropy = per_episode(new.entropy, mask)

        loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy
        metrics = {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "policy/entropy_avg": masked_mean(new.entropy, mask),
        }
        return loss, metrics

    def evaluate(self, policy: ActorCritic, batch: Batch) -> Evaluation:
        """Evaluate a batch with a policy, with gradients; with `estimator="q"` the value is Q of the response token."""
        new = super().evaluate(policy, batch)
        if self.action_values is None:
            return new
        return new._replace(value=self.action_values.of_sequences(policy, batch.sequences)[0])

    def training_tensors(self) -> dict[str, Tensor]:
        """Return the weights that Q adds to the critic's, for a checkpoint."""
        own = {} if self.action_values is None else {"action_values": self.action_values.weight.detach()}
        return {**super().training_tensors(), **own}

    def load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of `training_tensors`."""
        if self.action_values is not None:
            with torch.no_grad():
                self.action_values.weight.copy_(tensors["action_values"])
            tensors = {name: tensor for name, tensor in tensors.items() if name != "action_values"}
        super().load_training_tensors(tensors)

    def weight(self, batch: Batch) -> int:
        """Return the number of episodes, because the loss is a mean over episodes."""
        return len(batch)
