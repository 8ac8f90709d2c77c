"""Proximal policy optimisation, token by token (Schulman et al., 2017; for language models: Ziegler et al., 2019).

    textgym train --env textgym/Sentiment-v0 --model tiny --total-episodes 4096 --output-dir runs/ppo

One update:
    1. Collect whole episodes with the current policy, and the log-probs they were sampled with.    rollout.py
    2. Price every token: reward - beta KL(pi, pi_ref), the score on the last token.                 textgym/rewards
    3. Advantages by GAE, whitened over real tokens.                                                 advantages.py
    4. Several epochs of minibatches of whole sequences: clipped policy and value losses.            losses.py
Every mean is over real tokens. Importance ratios start from the behaviour log-probs, so the first ratio is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation
from textgym.models.sequences import Sequences

from .advantages import gae, masked_mean, whiten
from .losses import clipped_policy_loss, clipped_value_loss
from .on_policy import Metrics, OnPolicyAgent, OnPolicyConfig
from .rollout import Rollout


@dataclass
class PPOConfig(OnPolicyConfig):
    """The knobs of PPO; the KL's coefficient and estimator are the environment's."""

    num_epochs: int = 2
    """Passes over each rollout."""
    minibatch_size: int = 32
    """Episodes in a minibatch."""
    gamma: float = 1.0
    """Discount; text has no reason to hurry."""
    lam: float = 0.95
    """GAE's lambda."""
    clip_range: float = 0.2
    """The ratio earns nothing more beyond 1 - clip_range and 1 + clip_range."""
    clip_range_value: float | None = 0.2
    """Values move by at most this much an update before their loss stops falling; None for no limit."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float | None = None
    """Ends an update's epochs when the approximate KL to the old policy, per token, exceeds 1.5 times this."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout's real tokens."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1, without moving their mean."""


class PPO(OnPolicyAgent):
    """PPO with clipped objectives over whole episodes, see the module's text and `OnPolicyAgent`.

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

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Steps 2 to 4 of the module's text."""
        config, mask = self.config, rollout.mask
        rewards = rollout.rewards() - self.penalty.coef * kl  # (N, T)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        figures = _Means()
        for rows in self._minibatches(len(rollout)):
            batch = _Batch(
                rollout.sequences[rows], rollout.log_probs[rows], rollout.values[rows], advantages[rows], returns[rows]
            )
            with torch.autocast(rollout.scores.device.type, torch.bfloat16, enabled=config.bf16):
                new = self.policy.evaluate(batch.sequences, entropy_gradient=config.entropy_coef != 0)
            loss, minibatch = self._loss(new, batch)
            minibatch["val/grad_norm"] = self.step(loss)
            figures.add(minibatch)
            if config.target_kl is not None and minibatch["policy/approxkl_avg"] > 1.5 * config.target_kl:
                break
        error = masked_mean((returns - rollout.values).square(), mask)
        variance = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
        return {**figures.means(), "val/explained_variance": float(1 - error / variance.clamp(min=1e-8))}

    def _loss(self, new: Evaluation, batch: _Batch) -> tuple[Tensor, Metrics]:
        config, mask = self.config, batch.sequences.mask
        width = mask.shape[1]  # a minibatch is as wide as its own longest response
        old_log_probs, old_values, advantages, returns = (
            x[:, :width] for x in (batch.log_probs, batch.values, batch.advantages, batch.returns)
        )
        policy = clipped_policy_loss(new.log_prob, old_log_probs, advantages, mask, config.clip_range)
        value = clipped_value_loss(new.value, old_values, returns, mask, config.clip_range_value)
        entropy = masked_mean(new.entropy, mask)
        loss = policy.loss + config.value_coef * value.loss - config.entropy_coef * entropy
        figures = {
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction,
            "loss/policy_avg": policy.loss,
            "loss/value_avg": value.loss,
            "val/clipfrac_avg": value.clip_fraction,
            "val/ratio": policy.ratio,
            "policy/entropy_avg": entropy,
        }
        return loss, {name: float(figure.detach()) for name, figure in figures.items()}

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Row indices of every minibatch of every epoch; each epoch sees each episode once, in a new order."""
        for _ in range(self.config.num_epochs):
            order = torch.randperm(count, generator=self.shuffler)
            yield from order.to(self.policy.device).split(self.config.minibatch_size)


@dataclass(frozen=True)
class _Batch:
    """A minibatch: whole sequences and what was known of their tokens when they were sampled."""

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class _Means:
    """Running means of the minibatches' figures."""

    def __init__(self) -> None:
        self.sums: Metrics = {}
        self.count = 0

    def add(self, figures: Metrics) -> None:
        self.count += 1
        for name, figure in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + figure

    def means(self) -> Metrics:
        return {name: total / self.count for name, total in self.sums.items()}
