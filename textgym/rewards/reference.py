"""SyncReference: a reference that follows the policy."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import freeze
from textgym.models.merging import merged, tie_if_equal, untie
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import KLPenalty


class SyncReference:
    """Moves the reference towards the policy after every so many updates.

    reference <- alpha policy + (1 - alpha) reference, weight by weight (Gorbatovski et al., 2024, "Learn Your Reference
    Model"). `alpha=1` makes it a copy of the policy; `every=1` with a small alpha, a moving average of the policies so
    far. From then on the KL is measured, and paid, to the moved reference. Models that share the reference, such as
    other environments, keep the one they have.

    It is a callback of textgym's agents: `agent.learn(4096, callback=[SyncReference(every=8)])`.

    Args:
        every: updates from one move to the next.
        alpha: how far to go, above 0 and at most 1.

    Raises:
        ValueError: `every` below 1 or alpha out of its range; before the first rollout, an agent with a replay buffer,
            which holds log-probs of the reference as it was; when it moves, a reference of another architecture.
    """

    def __init__(self, every: int, alpha: float = 1.0) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 update, got {every}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is a share, above 0 and at most 1; got {alpha}")
        self.every, self.alpha = every, alpha

    def on_training_start(self, agent: Any) -> None:
        """Called by agents before the first update: refuse those whose reference may not move."""
        if not agent.reference_may_move:
            raise ConfigError(
                f"{type(agent).__name__} replays old episodes with the log-probs that the reference gave them, so the "
                "reference may not move: leave SyncReference out, or use an on-policy agent"
            )

    def __call__(self, agent: Any, metrics: dict[str, float]) -> None:
        """Called by agents after each update."""
        if agent.updates % self.every == 0:
            self.sync(agent.penalty, agent.policy)

    @torch.no_grad()
    def sync(self, penalty: KLPenalty, policy: ActorCritic) -> None:
        """Moves a penalty's reference now."""
        if not penalty.owns_reference:
            penalty.reference = own_copy(penalty.reference)
            penalty.owns_reference = True
        lm, reference = policy.plain_lm(), penalty.reference.lm
        if len(list(lm.parameters())) > len(list(reference.parameters())):
            untie(reference)  # as the policy is, whose adapter moves one of two tied weights
        source, target = _weights(lm), _weights(reference)
        if {name: x.shape for name, x in source.items()} != {name: x.shape for name, x in target.items()}:
            raise ValueError("the reference has other weights than the policy: only a copy of its start can follow it")
        moved: set[int] = set()
        for name, weight in target.items():
            if id(weight) in moved:
                continue  # tied weights move once
            moved.add(id(weight))
            new = source[name].to(weight)
            weight.copy_(weight.lerp(new, self.alpha) if weight.is_floating_point() else new)
        tie_if_equal(reference)
        penalty.reference.reset_cache()


def own_copy(reference: TokenModel) -> TokenModel:
    """A plain copy that shares nothing; adapters are merged into it."""
    return freeze(TokenModel(merged(reference.lm), reference.temperature))


def _weights(lm: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names, of which tied ones have several."""
    return dict(itertools.chain(lm.named_parameters(remove_duplicate=False), lm.named_buffers()))
