"""Proximal policy optimisation, token by token (Schulman et al., 2017; for language models: Ziegler et al., 2019).

    textgym train --env textgym/Sentiment-v0 --model tiny --total-episodes 4096 --output-dir runs/ppo

`PPO.update` is one update and `PPO.loss` its objective, both in the order of the paper. The loop that collects
episodes, measures the KL to the reference, reports metrics and saves is in common/rollout_agent.py; minibatches and the
optimiser step are in common/policy_gradient.py. All means are over response tokens.

With `variant="penalty"` the surrogate is not clipped but has a penalty on KL(old, new). Its coefficient is doubled
after an update with a large KL and halved after one with a small KL.

With `normalise_values=False`, whole updates equal those of TRL 1.12, its last version with PPO, except for five
differences. The score is the reward of the last token, EOS included; TRL adds it to the padding after EOS, and trains
the critic there too. Masks come from lengths. Whitening divides by the number of tokens, not by this number minus one.
Each token of a minibatch has the same weight; in TRL each micro-batch has. Each minibatch has a step; TRL makes one
after every `gradient_accumulation_steps` micro-batches, however many minibatches these are. There are options that TRL
lacks: another clip range above 1, a dual clip, a value loss without clipping, and another lambda for the critic's
targets.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation

from .common.advantages import discounted_returns, gae
from .common.means import masked, masked_mean, overall_mean, whiten
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.rollout import Rollout
from .common.rollout_agent import Metrics
from .configs.ppo import PPOConfig
from .configs.rollout import RolloutAgentConfig
from .machine.distributed import count, rank, sum_over_processes
from .objectives.critic_agent import CriticAgent
from .objectives.pretraining import PretrainingTexts, negative_log_likelihood


class PPO(CriticAgent):
    """PPO over whole episodes of text; arguments as `RolloutAgent`.

    >>> import gymnasium as gym
    >>> from textgym import ActorCritic
    >>> from textgym.agents import PPO, PPOConfig
    >>> envs = gym.make_vec("textgym/Sentiment-v0", num_envs=4, max_new_tokens=4)
    >>> agent = PPO(ActorCritic.from_pretrained("tiny"), envs, PPOConfig(episodes_per_update=4, minibatch_size=4))
    >>> agent.learn(total_episodes=8).updates
    2
    """

    config_class: ClassVar[type[RolloutAgentConfig]] = PPOConfig
    config: PPOConfig

    def __init__(self, policy: Any, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        self.penalty_coef = self.config.penalty_coef
        if self.config.kl_in == "loss":
            self.refuse_clamp()
        self.pretraining: PretrainingTexts | None = None
        if self.config.ptx_data is not None:
            tokenizer, longest = self.base_env.tokenizer, self.config.ptx_max_length
            self.pretraining = PretrainingTexts(self.config.ptx_data, tokenizer, self.policy, longest)

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update of PPO (Schulman et al., 2017, algorithm 1) from a rollout and the KL of its tokens."""
        config, mask = self.config, rollout.training_mask

        # 1. Rewards: the KL penalty on every token, the score and the costs of constraints on the last one (Ziegler et
        #    al., 2019, equation 2).
        rewards = self.charge_costs(rollout)  # (N, T)
        if config.kl_in == "reward":
            rewards = self.penalty.charge(rewards, kl)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        # 2. The scale of the values, fitted before they are used (van Hasselt et al., 2016).
        rollout = self.fit_scale(rollout, discounted_returns(rewards, mask, config.gamma))

        # 3. Advantages by GAE (Schulman et al., 2016, equation 16), whitened over response tokens only, because padding
        #    would shift the mean. Returns, the critic's targets, are computed from advantages before whitening. They
        #    may have another lambda (Yuan et al., 2025, "VC-PPO", section 4.2).
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)  # (N, T)
        if config.critic_lam is not None:
            _, returns = gae(rewards, rollout.values, mask, config.gamma, config.critic_lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        corrections: TensorMetrics = {}
        if config.importance_cap is not None:
            rollout, advantages, corrections = self.corrected(rollout, advantages, config.importance_cap)

        # 4. Several epochs of minibatches of whole episodes, one optimiser step each.
        steps: list[TensorMetrics] = []
        for minibatch in self.minibatches(rollout, advantages, returns):
            steps.append(self.step(minibatch))
            # Reading the metric makes the host wait for the device, so it is read only if it is needed.
            if config.target_kl is not None and float(steps[-1]["policy/approxkl_avg"]) > 1.5 * config.target_kl:
                break

        # 5. Metrics: means over the steps, and the explained variance of the critic before them.
        further = self.explained(rollout, returns)
        metrics = self.finish(steps, {**further, **corrections})
        if config.variant == "penalty":
            metrics |= self.adapt_penalty(rollout)
        return metrics

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return L_policy + c_1 L_value - c_2 H (Schulman et al., 2017, equation 9), means over response tokens."""
        config, mask = self.config, batch.response_mask

        # 1. Importance ratios r = pi / pi_old. Both are log-probs of the sampled distribution, so r = 1 in the first
        #    step. Padding is replaced before exp: a NaN there would reach the gradient although it is masked later.
        log_ratio = masked(new.log_prob - batch.log_probs, mask)  # (N, T)
        ratio = log_ratio.exp()
        advantages = masked(batch.advantages, mask)
        approx_kl = ratio - 1 - log_ratio  # k3 of KL(old, new), at least 0 for every token

        # 2. Policy loss: the surrogate r A, with a penalty or with clipping.
        plain = ratio * advantages
        clipped = plain
        if config.variant == "penalty":  # r A - beta KL(old, new) (equation 8)
            objective = plain - self.penalty_coef * approx_kl
        else:  # min(r A, clip(r, 1 - eps, 1 + eps) A) (equation 7)
            high = config.clip_range if config.clip_range_high is None else config.clip_range_high
            clipped = ratio.clamp(1 - config.clip_range, 1 + high) * advantages
            objective = torch.minimum(plain, clipped)
            if config.dual_clip is not None:  # if A < 0, at least c A for any ratio (Ye et al., 2020, equation 5)
                objective = torch.where(
                    advantages < 0, torch.maximum(objective, config.dual_clip * advantages), objective
                )
        policy_loss = masked_mean(-objective, mask)

        # 3. Value loss: half the maximum of the squared errors of the value and of the value clipped around the old
        #    one, in units of `value_std`. If the clipped error is larger and the clip is active, the gradient is zero.
        values, old_values, returns = (
            masked(x, mask) / self.value_std for x in (new.value, batch.values, batch.returns)
        )
        error = (values - returns).square()
        clipped_error = error
        if (reach := config.clip_range_value) is not None:
            # Values within the range stay as they are: the rounding of old + clip(V - old) would count as clipping.
            clipped_values = values.clamp(old_values - reach, old_values + reach)
            clipped_error = (clipped_values - returns).square()
        value_loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), mask)

        # 4. Entropy bonus; the entropy has no gradient if its coefficient is 0.
        entropy = masked_mean(new.entropy, mask)

        unit = 1.0 if config.whiten_advantages else self.value_std  # of the advantages
        loss = policy_loss + config.value_coef * unit * value_loss - config.entropy_coef * entropy
        with torch.no_grad():
            metrics: TensorMetrics = {
                "policy/approxkl_avg": masked_mean(approx_kl, mask),
                "policy/clipfrac_avg": masked_mean((clipped < plain).float(), mask),
                "loss/policy_avg": policy_loss,
                "loss/value_avg": value_loss,
                "val/clipfrac_avg": masked_mean((clipped_error > error).float(), mask),
                "val/ratio": masked_mean(ratio, mask),
                "policy/entropy_avg": entropy,
            }

        # 5. The KL to the reference, if it is part of the loss and not of the reward.
        if batch.reference_log_probs is not None:
            kl = masked_mean(self.kl_to_reference(new, batch, config.kl_gradient), mask)
            loss = loss + self.penalty.coef * kl
            metrics["loss/kl_avg"] = kl.detach()
        return loss, metrics

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate of every token; store the reference's log-probs if the loss needs them too."""
        if self.config.kl_in == "reward":
            return super().measure_kl(rollout)
        return self.measure_kl_for_loss(rollout, self.config.kl_gradient)

    def step(self, batch: Batch) -> TensorMetrics:
        """Make one optimiser step; see `PolicyGradientAgent`. With `ptx_data`, `loss/ptx_avg` is the loss of texts."""
        metrics = super().step(batch)
        return metrics if self.pretraining is None else {**metrics, "loss/ptx_avg": self.ptx_loss}

    def apply_gradients(self, loss: Tensor) -> Tensor:
        """Add the gradient of -c E[log pi(x)] over pretraining texts (Ouyang et al., 2022, equation 2), then step."""
        if self.pretraining is not None:
            texts = self.pretraining.sample(self.config.ptx_batch_size, self.shuffler)  # the same in all processes
            own = texts[rank() :: count()] if rank() < len(texts) else texts[:1]
            share = own.num_tokens / texts.num_tokens if rank() < len(texts) else 0.0
            likelihood_loss = share * self.learner(lambda policy: negative_log_likelihood(policy, own))
            (self.config.ptx_coef * likelihood_loss).backward()  # gradients are summed over processes
            self.ptx_loss = sum_over_processes(likelihood_loss.detach())
            loss = loss + self.ptx_loss
        return super().apply_gradients(loss)

    def adapt_penalty(self, rollout: Rollout) -> Metrics:
        """Double or halve the penalty's coefficient, depending on KL(old, new) (Schulman et al., 2017, section 4)."""
        log_ratio = self.new_log_probs(rollout) - rollout.log_probs
        distance = float(
            overall_mean(log_ratio.exp() - 1 - log_ratio, rollout.response_mask)
        )  # KL(old, new) in nats a token
        metrics = {"policy/penalty_coef": self.penalty_coef, "policy/kl_old_new": distance}
        if self.trains_critic_alone:  # the policy does not move, whatever the coefficient is
            return metrics
        if distance > self.config.kl_max:
            self.penalty_coef *= 2
        elif distance < self.config.kl_min:
            self.penalty_coef /= 2
        return metrics

    def training_state(self) -> dict[str, Any]:
        """Return the coefficient of the penalty, for a checkpoint."""
        return {**super().training_state(), "penalty_coef": self.penalty_coef}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the coefficient of `training_state`."""
        super().load_training_state(state)
        self.penalty_coef = state["penalty_coef"]
