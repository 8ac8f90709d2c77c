"""PromptGroupAgent: several episodes of each prompt, whose returns are compared with each other instead of a critic."""

from __future__ import annotations

import torch
from torch import Tensor

from textgym.models.machine.transfer import to_host

from ..common.advantages import GroupComparison, compare_groups
from ..common.policy_gradient import PolicyGradientAgent
from ..common.rollout import Rollout
from ..common.rollout_agent import Metrics
from ..configs.policy_gradient import PromptGroupConfig
from ..machine.distributed import everyone


class PromptGroupAgent(PolicyGradientAgent):
    """Base class of agents whose episodes are groups of `group_size` with the same prompt; arguments as `RolloutAgent`.

    Raises:
        ConfigError: If `group_size` does not divide `episodes_per_update`, or there are fewer groups than processes.
    """

    config: PromptGroupConfig

    @property
    def episodes_per_prompt(self) -> int:  # type: ignore[override]  # read alone
        """Number of episodes of each prompt."""
        return self.config.group_size

    def compared(self, returns: Tensor, scored: Tensor) -> GroupComparison:
        """Compare the returns `(N,)` within each group, over the episodes that have a score, bool `(N,)`."""
        return compare_groups(self.grouped(returns), self.grouped(scored))

    def flat_groups(self, rollout: Rollout) -> Tensor:
        """Return the groups whose scores are all equal, bool `(groups,)` on the host."""
        [informative] = to_host(self.compared(rollout.scores, rollout.scored).informative[:, 0])
        return ~informative

    def rollout_metrics(self, rollout: Rollout, kl: Tensor) -> Metrics:
        """Return the metrics of a rollout, and the share of its groups whose scores are all equal."""
        parts = everyone(self.flat_groups(rollout))
        return {**super().rollout_metrics(rollout, kl), "val/equal_scores": float(torch.cat(parts).float().mean())}

    def grouped(self, values: Tensor) -> Tensor:
        """Return values of episodes `(N,)` as `(groups, group_size)`."""
        return values.view(-1, self.config.group_size)
