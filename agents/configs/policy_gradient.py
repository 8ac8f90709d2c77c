"""Hyperparameters that policy-gradient agents share: minibatches, the critic, groups of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeVar

from textgym.errors import ConfigError
from textgym.settings import MOST, Count, NotNegative, Positive, at_least, at_most, between, unmet

from .rollout import RolloutAgentConfig

Config = TypeVar("Config")
CRITIC_STEPS = 3.0
"""Learning rate of a separate critic beside the policy's: with the same one it hardly learns in a few thousand episodes
(`python benchmarks/learning/defaults.py`)."""

KLInLoss = Literal["token", "sequence", "k3"]
"""Gradient of a KL to the reference that is part of the loss: "token" is k3 times the importance ratio, whose gradient
is that of the KL of each token's state, while tokens do not pay for the KL of later states; "sequence" has the gradient
of the KL of whole texts (`textgym.rewards.kl.sequence_kl`), by sums over the vocabulary and one more pass of the
reference, if the loss has one weight for all tokens; "k3" is k3 alone, whose gradient is that of KL(pi_ref, pi)."""


@dataclass(kw_only=True)
class PolicyGradientConfig(RolloutAgentConfig):
    """Hyperparameters of all policy-gradient agents. KL coefficient and estimator are arguments of the environment."""

    num_epochs: Count = 1
    """Number of epochs over each rollout."""
    minibatch_size: Count | None = None
    """Episodes in a minibatch, over all processes; None for all episodes of the rollout."""
    micro_batch_size: Count | None = None
    """Episodes in one forward pass; the gradients add up to that of the minibatch. None for the whole minibatch."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: NotNegative | None = None
    """End the epochs of an update when the approximate KL to the old policy, per token, exceeds 1.5 times this."""
    constraints: dict[str, float] = field(default_factory=dict)
    """Upper limits on the means of reward functions, by name; each has a Lagrange multiplier that takes the function's
    value off the reward, and that grows while the mean is above the limit."""
    constraint_learning_rate: Positive = 0.01
    """Step size of the multipliers."""
    ema_decay: Annotated[float, between(0, 1)] | None = None
    """Keep an average of the policy's weights, `agent.averaged`, in which each update has the weight 1 - `ema_decay`;
    None for no average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, limit in self.constraints.items():
            if (expected := unmet(limit, float)) is not None:
                raise ConfigError(f"constraints must be limits by name; that of {name!r} must be {expected}: {limit!r}")


SEPARATE = ("critic_learning_rate", "critic_weight_decay", "critic_max_grad_norm", "freezing_actor_steps")


@dataclass(kw_only=True)
class CriticConfig(PolicyGradientConfig):
    """Hyperparameters of all policy-gradient agents with a critic."""

    normalise_values: bool = True
    """Learn values on a running scale of the returns (PopArt), so that the unit of the rewards makes no difference; the
    value loss and its clip range are then in standard deviations of the returns."""
    critic_learning_rate: NotNegative | None = None
    """Peak learning rate of a separate critic; None for `learning_rate`."""
    critic_weight_decay: NotNegative | None = None
    """Weight decay of a separate critic; None for `weight_decay`."""
    critic_max_grad_norm: Positive | None = None
    """Maximum norm of the gradient of a separate critic, which is clipped separately; None for `max_grad_norm`."""
    freezing_actor_steps: Count | None = None
    """Number of updates at the start in which only a separate critic is trained, so that the first steps of the policy
    follow a critic that has seen some returns; None for none."""


@dataclass(kw_only=True)
class PromptGroupConfig(PolicyGradientConfig):
    """Hyperparameters of all agents that compare episodes of one prompt."""

    group_size: Annotated[int, at_least(2), at_most(MOST)] = 8
    """Number of episodes of each prompt; it must divide `episodes_per_update`."""


def suitable_critic(config: Config) -> tuple[str, Config]:
    """Return the kind of critic that suits an agent, "separate" or "shared", and the config with its learning rate."""
    # REINFORCE has a critic only as its learned baseline.
    if not isinstance(config, CriticConfig) or getattr(config, "baseline", "learned") != "learned":
        return "shared", config
    if config.critic_learning_rate is None and getattr(config, "value_coef", 1.0) > 0:  # else it is not trained
        config = replace(config, critic_learning_rate=CRITIC_STEPS * config.learning_rate)
    return "separate", config
