"""Constraints on the means of reward functions, by Lagrange multipliers (Ray et al., 2019; Dai et al., 2024).

    max_pi min_{lambda >= 0} E[r] - sum_k lambda_k (E[c_k] - d_k)

The policy is trained on r - sum_k lambda_k c_k, and the multiplier of a cost that is above its limit d_k grows:

    lambda_k <- max(0, lambda_k + eta (mean of c_k - d_k))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textgym.errors import ConfigError

from ..machine.distributed import sum_over_processes
from .means import overall_mean
from .metrics import TensorMetrics
from .rollout import Rollout


class Constraints:
    """Multipliers of upper limits on the means of reward functions.

    Args:
        limits: Upper limit of the mean of each cost, by the name of its reward function.
        learning_rate: eta, in units of reward per squared unit of cost.
        known: Names of the environment's reward functions.

    Raises:
        ConfigError: If the environment has no reward function of that name.
    """

    def __init__(self, limits: dict[str, float], learning_rate: float, known: Sequence[str]) -> None:
        for name in limits:
            if name not in known:
                raise ConfigError(
                    f"constraints has a limit on {name!r}, and the environment's reward functions are {list(known)}: "
                    "add the cost to reward=, with a weight of 0 in reward_weights"
                )
        self.limits, self.learning_rate = limits, learning_rate
        self.multipliers = dict.fromkeys(limits, 0.0)
        self.metrics: TensorMetrics = {}

    def charge(self, rollout: Rollout, learns: bool = True) -> Tensor:
        """Update the multipliers, and return the rewards `(N, T)` minus the costs, which are at the last tokens.

        A row that the cost function did not score has no cost. If it scored no row, its multiplier does not change.

        Args:
            rollout: The episodes.
            learns: Whether the multipliers move; not if the policy cannot respond to them.
        """
        rewards, last = rollout.rewards, (rollout.sequences.response_lengths - 1)[:, None]
        self.metrics = {}
        for name, limit in self.limits.items():
            cost = rollout.component(f"reward/{name}")  # (N,)
            known = ~cost.isnan()
            mean = overall_mean(cost, known)
            if sum_over_processes(known.sum()):
                step = self.learning_rate * (float(mean) - limit) if learns else 0.0
                self.multipliers[name] = max(0.0, self.multipliers[name] + step)
                self.metrics[f"constraint/{name}/mean"] = mean
            paid = self.multipliers[name] * torch.where(cost.isnan(), 0.0, cost)
            rewards = rewards.scatter_add(1, last, -paid[:, None].to(rewards.dtype))
            self.metrics[f"constraint/{name}/multiplier"] = torch.tensor(self.multipliers[name], device=mean.device)
        return rewards
