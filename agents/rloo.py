"""REINFORCE leave-one-out (Kool et al., 2019; for language models: Ahmadian et al., 2024), and REINFORCE++.

    textgym train --agent rloo --output-dir runs/rloo

The score of an episode, KL penalty taken off, is compared with the mean of the other episodes of its prompt:

    A_i = R_i - 1/(k - 1) sum_{j != i} R_j

which needs no critic and is unbiased. With `normalise="batch"` advantages are scaled over the whole rollout as well
(Hu, 2025, "REINFORCE++", with its group baseline). An episode is one action with one ratio, clipped as in PPO, which
has an effect from a second epoch or minibatch on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from textgym.models.actor_critic import Evaluation
from textgym.settings import NotNegative

from .common.advantages import masked_mean, whiten
from .common.group import GroupAgent, GroupConfig
from .common.losses import per_episode, sequence_policy_loss
from .common.on_policy import OnPolicyConfig
from .common.rollout import Rollout
from .common.surrogate import Batch, Targets


@dataclass
class RLOOConfig(GroupConfig):
    """The knobs of RLOO."""

    normalise: Literal["none", "batch"] = "none"
    """Whether advantages are scaled to mean 0 and variance 1 over the rollout, as in REINFORCE++."""
    clip_range: NotNegative = 0.2
    """The ratio earns nothing more beyond 1 - clip_range and 1 + clip_range."""


class RLOO(GroupAgent):
    """See the module's text and `GroupAgent`."""

    config_class: ClassVar[type[OnPolicyConfig]] = RLOOConfig
    config: RLOOConfig

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """Each episode against the others of its prompt."""
        returns = self.grouped(rewards.sum(1))
        others = (returns.sum(1, keepdim=True) - returns) / (self.config.group_size - 1)
        advantages = torch.where(rollout.mask, (returns - others).reshape(-1, 1), 0.0)
        return Targets(whiten(advantages, rollout.mask) if self.config.normalise == "batch" else advantages)

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate of whole episodes, whose tokens share one advantage."""
        config, mask = self.config, batch.mask
        advantages = batch.advantages[:, 0]
        policy = sequence_policy_loss(new.log_prob, batch.log_probs, advantages, mask, config.clip_range)
        entropy = per_episode(new.entropy, mask)
        return policy.loss - config.entropy_coef * entropy, {
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction,
            "loss/policy_avg": policy.loss,
            "val/ratio": policy.ratio,
            "policy/entropy_avg": masked_mean(new.entropy, mask),
        }

    def weight(self, batch: Batch) -> int:
        """Its episodes, over which the policy gradient is a mean."""
        return len(batch)
