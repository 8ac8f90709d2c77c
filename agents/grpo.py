"""Group relative policy optimisation (Shao et al., 2024) and its descendants Dr. GRPO, DAPO and BNPO.

    textgym train --agent grpo --output-dir runs/grpo

    A_i = (R_i - mean of its prompt's group) / (standard deviation of the group + 1e-4)

for all tokens of episode i, in PPO's clipped surrogate without a critic. Mean and standard deviation are over the
episodes that have a score. If all returns of a group are equal, its advantages are 0, and only KL and entropy in the
loss have a gradient; the share of these groups is a metric. A group with fewer than two scores is left out.

`loss_type` selects the average of the loss. `clip_range_high` allows rare tokens to become more likely (DAPO).
`scale="none"` does not divide by the standard deviation, because this division gives more weight to prompts that are
almost always or almost never solved (Dr. GRPO).

The KL penalty is part of the reward, as in all other agents, or of the loss with `kl_in="loss"`. As a loss k3 alone has
the on-policy gradient of KL(pi_ref, pi); k3 times the importance ratio has that of KL(pi, pi_ref), which is the KL of
the objective (`kl_gradient`). The mean of a group includes the episode itself, so the gradient of the score is 1 - 1/k
of the true gradient in groups of k, and a KL in the loss has a larger relative weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import Evaluation, PolicyLike
from textgym.models.machine.transfer import to_host
from textgym.rewards.kl import estimate_kl
from textgym.settings import Positive

from .common.means import masked_mean, overall_mean
from .common.metrics import TensorMetrics
from .common.policy_gradient import Batch
from .common.prompt_groups import PromptGroupAgent, PromptGroupConfig
from .common.rollout import Rollout
from .common.rollout_agent import Metrics, RolloutAgentConfig


@dataclass
class GRPOConfig(PromptGroupConfig):
    """Hyperparameters of GRPO. The coefficient of the KL to the reference is an argument of the environment."""

    scale: Literal["group", "none"] = "group"
    """Whether to divide advantages by the standard deviation of their group."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """Average of the loss: "grpo" over the tokens of each episode and then over episodes, "dr_grpo" over episodes times
    the maximum length, "dapo" over all response tokens of the minibatch, "bnpo" over those of each micro-batch."""
    clip_range: Positive = 0.2
    """Clip the ratio to [1 - clip_range, 1 + clip_range]."""
    clip_range_high: Positive | None = None
    """Another clip range above 1; DAPO's clip-higher uses 0.28. None for `clip_range`."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is part of the reward or of the loss."""
    kl_gradient: Literal["exact", "k3"] = "exact"
    """Gradient of a KL in the loss: "exact" is k3 times the importance ratio; "k3" is k3 alone, as published."""


class GRPO(PromptGroupAgent):
    """Group relative policy optimisation; arguments as `PromptGroupAgent`."""

    config_class: ClassVar[type[RolloutAgentConfig]] = GRPOConfig
    config: GRPOConfig
    reference_log_probs: Tensor | None = None  # (N, T) of the rollout, if the loss has the KL

    def __init__(self, policy: PolicyLike, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        if self.config.kl_in == "loss" and self.penalty.clamp is not None:
            raise ConfigError(
                f"kl_clamp={self.penalty.clamp} would remove the gradient of a larger KL in the loss: leave "
                "kl_clamp out, or apply the KL penalty in the reward with kl_in='reward'"
            )

    def update(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Make one update (Shao et al., 2024, algorithm 1) from a rollout and the KL of its tokens."""
        config, mask = self.config, rollout.training_mask

        # 1. The return of an episode: its score, minus the KL penalty of all its tokens unless the loss has it.
        rewards = rollout.rewards  # (N, T)
        if config.kl_in == "reward":
            rewards = self.penalty.charge(rewards, kl)
        groups = self.compared(rewards.double().sum(1), rollout.scored)  # (groups, group_size)

        # 2. Advantages: the return minus the group's mean, the same for all tokens of an episode; 1e-4 as in TRL.
        # Below 1e-6 returns differ by the rounding of the KL alone, which the division by 1e-4 would make a thousandth.
        informative = groups.informative & (groups.standard_deviation > 1e-6)  # (groups, 1)
        advantages = torch.where(informative, groups.differences, 0.0)
        if config.scale == "group":
            advantages = advantages / (groups.standard_deviation + 1e-4)
        advantages = torch.where(mask, advantages.reshape(-1, 1), 0.0).float()  # (N, T)

        # 3. Groups of equal returns have advantage 0, but count in the means of the loss: otherwise the gradient of
        #    the others would grow with their number. If nothing else in the loss has a gradient, they need no pass.
        [comparable, different] = to_host(groups.comparable.flatten(), (informative & groups.comparable).flatten())
        alone = self.reference_log_probs is None and config.entropy_coef == 0 and config.loss_type != "bnpo"
        with_gradient = different if alone else None

        # 4. Minibatches of whole episodes, one optimiser step each.
        steps: list[TensorMetrics] = []
        rows = comparable.nonzero()[:, 0]
        for minibatch in self.minibatches(rollout, advantages, rows=rows, with_gradient=with_gradient):
            steps.append(self.step(minibatch))
            if config.target_kl is not None and float(steps[-1]["policy/approxkl_avg"]) > 1.5 * config.target_kl:
                break

        # 5. Metrics, and the share of the groups whose returns are equal.
        return self.finish(steps, {"frac_reward_zero_std": 1 - overall_mean(informative.float())})

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, TensorMetrics]:
        """Return the clipped surrogate (Shao et al., 2024, equation 3), a sum over tokens weighted by `weights`."""
        config, mask = self.config, batch.response_mask
        weights = self.weights(batch)  # (N, T)

        # 1. PPO's clipped surrogate; DAPO's clip-higher has another bound above 1 (Yu et al., 2025, section 3.1).
        log_ratio = torch.where(mask, new.log_prob - batch.log_probs, 0.0)  # (N, T)
        ratio = log_ratio.exp()
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        plain = ratio * batch.advantages
        clipped = ratio.clamp(1 - config.clip_range, 1 + high) * batch.advantages
        policy_loss = (weights * -torch.minimum(plain, clipped)).sum()

        # 2. Entropy bonus; the entropy has no gradient if its coefficient is 0.
        loss = policy_loss - config.entropy_coef * (weights * torch.where(mask, new.entropy, 0.0)).sum()

        with torch.no_grad():
            metrics = {
                "policy/approxkl_avg": masked_mean(ratio - 1 - log_ratio, mask),
                "policy/clipfrac_avg": masked_mean((clipped < plain).float(), mask),
                "loss/policy_avg": policy_loss,
                "val/ratio": masked_mean(ratio, mask),
                "policy/entropy_avg": masked_mean(new.entropy, mask),
            }

        # 3. The KL to the reference, if it is part of the loss and not of the reward.
        if self.reference_log_probs is not None:
            kl = self.kl_to_reference(new.log_prob, batch)  # (N, T)
            loss = loss + self.penalty.coef * (weights * kl).sum()
            metrics["loss/kl_avg"] = (weights * kl).sum()
        return loss, metrics

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL estimate of every token; store the reference's log-probs if the loss needs them too."""
        self.reference_log_probs = None
        if self.config.kl_in == "loss" and self.penalty.coef > 0:
            self.reference_log_probs = self.penalty.reference.sequence_log_probs(rollout.sequences)
        if self.reference_log_probs is None or self.penalty.estimator == "full":
            return super().measure_kl(rollout)
        return self.penalty.of_log_probs(rollout.log_probs, self.reference_log_probs, rollout.response_mask)

    def kl_to_reference(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Return k3 of every token `(N, T)` (Schulman, 2020), with the gradient that `kl_gradient` selects."""
        assert self.reference_log_probs is not None
        mask = batch.response_mask
        reference = self.reference_log_probs[batch.indices, : mask.shape[1]]
        kl = estimate_kl(torch.where(mask, log_probs, 0.0), torch.where(mask, reference, 0.0), "k3")
        if self.config.kl_gradient == "exact":
            kl = torch.where(mask, log_probs - batch.log_probs, 0.0).exp() * kl
        return kl

    def weights(self, batch: Batch) -> Tensor:
        """Return the weight of each token in the loss, `(N, T)`."""
        mask, kind = batch.response_mask, self.config.loss_type
        if kind == "grpo":
            return mask / mask.sum(1, keepdim=True) / len(batch)
        if kind == "dr_grpo":
            return mask / (len(batch) * self.base_env.max_new_tokens)
        return mask / mask.sum()

    def weight(self, batch: Batch) -> int:
        """Return the number of tokens for "dapo", whose loss is a token mean, and of episodes for the others."""
        return super().weight(batch) if self.config.loss_type == "dapo" else len(batch)
