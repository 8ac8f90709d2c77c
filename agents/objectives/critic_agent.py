"""CriticAgent: base class of policy-gradient algorithms with a critic: its scale, its optimiser settings, its start.

Values are learned on a running scale of the returns, so the unit of the rewards makes no difference: the critic's loss
and its clip range are in standard deviations of the returns. A separate critic is its own part of the optimiser.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from textgym.errors import ConfigError, NonFiniteError

from ..common.means import explained_variance, explained_variance_within_prompts, overall_mean
from ..common.metrics import TensorMetrics
from ..common.optimizer import PartSettings
from ..common.policy_gradient import Batch, PolicyGradientAgent
from ..common.rollout import Rollout
from ..common.rollout_agent import Metrics
from ..configs.policy_gradient import SEPARATE, CriticConfig

EXPLAINED = "val/explained_variance"
WITHIN_PROMPTS = "val/explained_variance_within_prompts"


class CriticAgent(PolicyGradientAgent):
    """Base class of policy-gradient agents with a critic; arguments as `RolloutAgent`.

    Attributes:
        value_std: Unit of the value loss: the running standard deviation of the returns, or 1.

    Raises:
        ConfigError: If the config has settings of a separate critic, and the policy's critic is shared.
    """

    config: CriticConfig
    value_std: Tensor | float = 1.0
    head_before: dict[str, Tensor] | None = None  # the value head, until the first step of an update is made

    def __init__(self, policy: Any, envs: Any, config: Any = None) -> None:
        super().__init__(policy, envs, config)
        given = [name for name in SEPARATE if getattr(self.config, name) is not None]
        if given and self.policy.critic is None:
            raise ConfigError(
                f"{given[0]}={getattr(self.config, given[0])} is for a separate critic, and this policy's critic "
                "shares its trunk: make the policy with ActorCritic.from_pretrained(..., critic='separate')"
            )

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the weights of the policy and of the critic; they are one part if the critic shares the trunk."""
        trained = self.learner.policy
        if trained.critic is None:
            return super().parts()
        critic = [*trained.critic.parameters(), *trained.value_head.parameters()]
        of_critic = {id(weight) for weight in critic}
        policy = [weight for weight in self.learner.parameters() if id(weight) not in of_critic]
        return {"policy": policy, "critic": critic}

    def part_settings(self, part: str) -> PartSettings:
        """Return the settings of the policy, or those of a separate critic, which default to the policy's."""
        shared, config = super().part_settings(part), self.config
        if part != "critic":
            return shared
        own = (config.critic_learning_rate, config.critic_weight_decay, config.critic_max_grad_norm)
        return PartSettings(*(other if value is None else value for value, other in zip(own, shared, strict=True)))

    @property
    def trains_critic_alone(self) -> bool:
        """Whether the policy stays as it is in this update. What responds to the policy's moves then waits for them."""
        return self.updates < (self.config.freezing_actor_steps or 0)

    def charge_costs(self, rollout: Rollout) -> Tensor:
        """Return the rewards `(N, T)` minus the costs of constraints, see `Constraints`."""
        return self.constraints.charge(rollout, learns=not self.trains_critic_alone)

    def adapt_kl(self, kl: float) -> None:
        """Update the coefficient of the KL penalty, unless the policy stays as it is."""
        if not self.trains_critic_alone:
            super().adapt_kl(kl)

    def fit_scale(self, rollout: Rollout, returns: Tensor) -> Rollout:
        """Fit the scale of the values to the returns of a rollout, before its advantages are estimated.

        Args:
            rollout: The rollout.
            returns: `(N, T)`, the returns of the episodes, which do not depend on the critic.

        Returns:
            The rollout, with the values that the critic has on the new scale: the same as before, or their mean if the
            critic has learned nothing yet.
        """
        if not self.config.normalise_values:
            return rollout
        mask, head = rollout.training_mask, self.policy.value_head
        mean = overall_mean(returns.double(), mask)
        variance = overall_mean((returns - mean).square(), mask)

        self.head_before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        new = head.fit(mean, variance)
        self.learner.take_value_head()
        self.value_std = head.std
        return replace(rollout, values=torch.where(rollout.response_mask & new, head.mean, rollout.values))

    def explained(self, rollout: Rollout, returns: Tensor) -> TensorMetrics:
        """Return the shares of the variance of the returns that the critic explained before the update.

        Args:
            rollout: The rollout, with the critic's values.
            returns: `(N, T)`, targets of the critic.
        """
        values, mask, prompts = rollout.values, rollout.training_mask, rollout.sequences.host.prompts
        return {
            EXPLAINED: explained_variance(values, returns, mask),
            WITHIN_PROMPTS: explained_variance_within_prompts(values, returns, mask, list(prompts)),
        }

    def finish(self, steps: list[TensorMetrics], further: TensorMetrics | None = None) -> Metrics:
        """Return the metrics of an update, see `PolicyGradientAgent`, without those that are not defined for it."""
        metrics = super().finish(steps, further)
        if math.isnan(metrics.get(WITHIN_PROMPTS, 0.0)):  # no prompt has two rows, or there is nothing to explain
            del metrics[WITHIN_PROMPTS]
        return metrics

    def step(self, batch: Batch) -> TensorMetrics:
        """Make one optimiser step; if the first one of an update is refused, the scale is as before the update, too."""
        skipped = self.finite_steps.skipped
        try:
            metrics = super().step(batch)
        except NonFiniteError:
            self._restore()
            raise
        if self.finite_steps.skipped > skipped:
            self._restore()
        self.head_before = None
        return metrics

    def _restore(self) -> None:
        if self.head_before is not None:  # no step was made since the fit
            self.restore_scale()

    def restore_scale(self) -> None:
        """Restore the value head of before the update."""
        assert self.head_before is not None
        self.policy.value_head.load_state_dict(self.head_before)
        self.learner.take_value_head()

    def apply_gradients(self, loss: Tensor) -> Tensor:
        """Make one optimiser step; see `RolloutAgent`. The policy has no gradient while the critic is trained alone."""
        if self.trains_critic_alone:
            for weight in self.parts()["policy"]:
                weight.grad = None
        return super().apply_gradients(loss)
