"""SyncReference: a reference that follows the policy."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn

from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import merged
from textgym.models.loading import freeze
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import KLPenalty


class SyncReference:
    """Moves the reference towards the policy after every so many updates.

    reference <- alpha policy + (1 - alpha) reference, weight by weight (Gorbatovski et al., 2024, "Learn Your Reference
    Model"). `alpha=1` makes it a copy of the policy; `every=1` with a small alpha, a moving average of the policies so
    far. From then on the KL is measured, and paid, to the moved reference. Models that share the reference, such as
    other environments, keep the one they have.

    It is a callback of textgym's agents: `agent.learn(4096, callbacks=[SyncReference(every=8)])`.

    Args:
        every: updates from one move to the next.
        alpha: how far to go, above 0 and at most 1.

    Raises:
        ValueError: `every` below 1 or alpha out of its range; when it moves, a reference of another architecture.
    """

    def __init__(self, every: int, alpha: float = 1.0) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 update, got {every}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is a share, above 0 and at most 1; got {alpha}")
        self.every, self.alpha = every, alpha

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
        source, target = (
            dict(itertools.chain(lm.named_parameters(), lm.named_buffers()))  # tied weights once
            for lm in (
                policy.lm if policy.lora is None else merged(policy.lora),
                penalty.reference.lm,
            )
        )
        if {name: x.shape for name, x in source.items()} != {name: x.shape for name, x in target.items()}:
            raise ValueError("the reference has other weights than the policy: only a copy of its start can follow it")
        for name, weight in target.items():
            new = source[name].to(weight)
            weight.copy_(weight.lerp(new, self.alpha) if weight.is_floating_point() else new)
        penalty.reference.reset_cache()


def own_copy(reference: TokenModel) -> TokenModel:
    """A copy that nobody shares; of weights under an adapter that is switched off, those weights."""
    adapter = reference.__dict__["adapter"]
    lm: nn.Module = copy.deepcopy(reference.lm) if adapter is None else copy.deepcopy(adapter).unload()
    return freeze(TokenModel(lm, reference.temperature))
