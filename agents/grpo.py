"""Group relative policy optimisation (Shao et al., 2024) and its descendants Dr. GRPO, DAPO and BNPO.

    textgym train --agent grpo --output-dir runs/grpo

    A_i = (R_i - mean of its prompt's group) / (deviation of the group + 1e-4)

for all tokens of episode i, in PPO's clipped surrogate without a critic. A group whose scores are all alike teaches
nothing and is left out; how many are is reported. `loss_type` says what the surrogate is a mean over, `clip_range_high`
lets rare tokens rise further (DAPO), `scale="none"` does not divide by the deviation (Dr. GRPO), which favours prompts
that are nearly solved or nearly hopeless.

The KL to the reference is paid in the reward, as by every other agent, or with `kl_in="loss"` as a term of the loss. As
a loss k3 alone has the gradient of KL(pi_ref, pi) where it is on-policy; times the importance ratio it has that of
KL(pi, pi_ref), which the objective means (`kl_gradient`). Since an episode is part of the mean that it is compared
with, the gradient of the score is 1 - 1/k of the true one, in groups of k; a KL in the loss weighs that much more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation
from textgym.models.machine.transfer import to_host
from textgym.rewards.kl import estimate_kl
from textgym.settings import NotNegative

from .common.advantages import masked_mean, overall_mean
from .common.group import GroupAgent, GroupConfig
from .common.losses import clipped_policy_loss
from .common.metrics import Figures
from .common.on_policy import OnPolicyConfig
from .common.rollout import Rollout
from .common.surrogate import Batch, Targets


@dataclass
class GRPOConfig(GroupConfig):
    """The knobs of GRPO; the coefficient of the KL to the reference is the environment's."""

    scale: Literal["group", "none"] = "group"
    """Divide advantages by the deviation of their group, or do not."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """What the loss is a mean over: "grpo" the tokens of each episode and then episodes, "dr_grpo" episodes times their
    longest possible length, "dapo" all real tokens of the minibatch, "bnpo" those of each micro-batch."""
    clip_range: NotNegative = 0.2
    """The ratio earns nothing more beyond 1 - clip_range and 1 + clip_range."""
    clip_range_high: NotNegative | None = None
    """Another range above 1: DAPO's clip-higher takes 0.28."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference is paid."""
    kl_gradient: Literal["exact", "k3"] = "exact"
    """Of a KL in the loss: k3 times the importance ratio, or k3 alone, as first published."""


class GRPO(GroupAgent):
    """See the module's text and `GroupAgent`."""

    config_class: ClassVar[type[OnPolicyConfig]] = GRPOConfig
    config: GRPOConfig

    def price(self, rollout: Rollout, kl: Tensor) -> Tensor:
        """Token rewards, with the KL penalty unless the loss has it."""
        return rollout.rewards() if self.config.kl_in == "loss" else super().price(rollout, kl)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """Each episode against its group."""
        returns = self.grouped(rewards.sum(1))
        centred = returns - returns.mean(1, keepdim=True)
        self.spread = returns.std(1) > 1e-6  # (groups,)
        if self.config.scale == "group":
            centred = centred / (returns.std(1, keepdim=True) + 1e-4)
        return Targets(torch.where(rollout.mask, centred.reshape(-1, 1), 0.0))

    def measure_kl(self, rollout: Rollout) -> Tensor:
        """Where the loss has the KL, it needs the reference's log-probs too: one pass gives both."""
        self.reference_log_probs: Tensor | None = None
        if self.config.kl_in == "loss" and self.penalty.coef > 0:
            self.reference_log_probs = self.penalty.reference.sequence_log_probs(rollout.sequences)
        if self.reference_log_probs is None or self.penalty.estimator == "full":
            return super().measure_kl(rollout)
        return self.penalty.of_log_probs(rollout.log_probs, self.reference_log_probs, rollout.mask)

    def figures(self) -> Figures:
        """The share of groups without spread."""
        return {"frac_reward_zero_std": 1 - overall_mean(self.spread.float())}

    def usable(self) -> Tensor | None:
        """Without a KL in the loss, groups without spread have no gradient and cost no work."""
        if self.reference_log_probs is not None:
            return None
        [spread] = to_host(self.spread)
        return spread.repeat_interleave(self.config.group_size).nonzero()[:, 0]

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate, and the KL if it is paid here."""
        config, mask = self.config, batch.mask
        weights = self.weights(batch)
        ranges = (config.clip_range, config.clip_range_high)
        policy = clipped_policy_loss(new.log_prob, batch.log_probs, batch.advantages, mask, *ranges, weights=weights)
        entropy = (weights * new.entropy).sum()
        loss = policy.loss - config.entropy_coef * entropy
        figures = {
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction,
            "loss/policy_avg": policy.loss,
            "val/ratio": policy.ratio,
            "policy/entropy_avg": masked_mean(new.entropy, mask),
        }
        if self.reference_log_probs is not None:
            kl = self.kl_to_reference(new.log_prob, batch)
            loss, figures["loss/kl_avg"] = loss + (weights * self.penalty.cost(kl)).sum(), (weights * kl).sum()
        return loss, figures

    def kl_to_reference(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """k3 of every token `(N, T)`, with the gradient that was asked for."""
        assert self.reference_log_probs is not None
        mask = batch.mask
        reference = self.reference_log_probs[batch.indices, : mask.shape[1]]
        kl = estimate_kl(torch.where(mask, log_probs, 0.0), torch.where(mask, reference, 0.0), "k3")
        if self.config.kl_gradient == "exact":
            kl = torch.where(mask, log_probs - batch.log_probs, 0.0).exp() * kl
        return kl

    def weights(self, batch: Batch) -> Tensor:
        """`(N, T)`, what each token counts in the loss."""
        mask, kind = batch.mask, self.config.loss_type
        if kind == "grpo":
            return mask / mask.sum(1, keepdim=True) / len(batch)
        if kind == "dr_grpo":
            return mask / (len(batch) * self.envs.unwrapped.task.episodes.max_new_tokens)
        return mask / mask.sum()

    def weight(self, batch: Batch) -> int:
        """By what the loss is a mean over."""
        return super().weight(batch) if self.config.loss_type == "dapo" else len(batch)
