"""Expert iteration: imitate one's own best texts (Anthony et al., 2017; "RAFT": Dong et al., 2023).

    textgym train --agent expert-iteration --group-size 8 --output-dir runs/expert

Of k episodes of each prompt the best by score, KL penalty taken off, are kept, and the policy is fine-tuned on them:

    L = -E[log pi(a_t | s_t)] over the tokens of the episodes that were kept

Keeping the best one distils best-of-k; keeping all that score at least `min_score` is rejection-sampling fine-tuning
(Gulcehre et al., 2023, "ReST"). What is worse than the best teaches nothing, so it is the baseline that whatever learns
from bad texts too should beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textgym.errors import ConfigError
from textgym.models.actor_critic import Evaluation
from textgym.models.machine.transfer import to_host
from textgym.settings import Count

from .common.advantages import masked_mean, overall_mean
from .common.group import GroupAgent, GroupConfig
from .common.metrics import Figures
from .common.on_policy import OnPolicyConfig
from .common.rollout import Rollout
from .common.surrogate import Batch, Targets


@dataclass
class ExpertIterationConfig(GroupConfig):
    """The knobs of expert iteration."""

    keep: Count = 1
    """How many episodes of each prompt are imitated, the best ones."""
    min_score: float | None = None
    """Of these only such as score at least this, KL penalty taken off; None: whatever they score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep > self.group_size:
            raise ConfigError(f"keep must be from 1 to group_size={self.group_size}, got {self.keep}")


class ExpertIteration(GroupAgent):
    """See the module's text and `GroupAgent`."""

    config_class: ClassVar[type[OnPolicyConfig]] = ExpertIterationConfig
    config: ExpertIterationConfig

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Targets:
        """1 for the episodes that are kept, 0 for the others."""
        returns = self.grouped(rewards.sum(1))
        kept = torch.zeros_like(returns)
        kept.scatter_(1, returns.topk(self.config.keep, dim=1).indices, 1.0)
        if self.config.min_score is not None:
            kept = torch.where(returns >= self.config.min_score, kept, 0.0)
        self.kept = kept.flatten()  # (N,)
        return Targets(torch.where(rollout.mask, self.kept[:, None], 0.0))

    def usable(self) -> Tensor | None:
        """The episodes that are kept."""
        [kept] = to_host(self.kept)
        return kept.nonzero()[:, 0]

    def loss(self, new: Evaluation, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood of the tokens, and the entropy bonus."""
        mask = batch.mask
        policy, entropy = -masked_mean(new.log_prob, mask), masked_mean(new.entropy, mask)
        log_ratio = new.log_prob.detach() - batch.log_probs
        return policy - self.config.entropy_coef * entropy, {
            "policy/approxkl_avg": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
            "loss/policy_avg": policy,
            "policy/entropy_avg": entropy,
        }

    def figures(self) -> Figures:
        """The share of the episodes that were kept."""
        return {"val/kept": overall_mean(self.kept)}
