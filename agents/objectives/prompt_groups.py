"""PromptGroupAgent: several episodes of each prompt, whose returns are compared with each other instead of a critic."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    """Base class of agents whose rows are groups of `group_size` with the same prompt; arguments as `RolloutAgent`.

    Raises:
        ValueError: If `group_size` does not divide the number of rows of the environment.
    """

    config: PromptGroupConfig

    def __init__(self, policy: Any, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        size = self.config.group_size
        if self.envs.num_envs % size:
            raise ValueError(
                f"group_size={size} must divide num_envs={self.envs.num_envs}: each prompt has so many rows"
            )

    def episode_options(self) -> dict[str, Any]:
        """Return the same prompt for all rows of each group."""
        prompts = self.next_prompts(self.envs.num_envs // self.config.group_size)
        return {"prompt_index": np.repeat(prompts, self.config.group_size).tolist()}

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
