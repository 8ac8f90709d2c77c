"""FlatWeights: the trainable weights of a policy's language model as one parameter, for TRPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.attention import States


class FlatWeights:
    """One vector in place of the language model's weights, while TRPO takes its step.

    sb3-contrib's TRPO builds a graph of its own for the gradient of every parameter it is shown and goes back through
    all of them for each product with the Fisher matrix, so its cost grows with their number; it also leaves out those
    with `value` in their name, as GPT-NeoX calls its projections. Shown one vector it does neither.

    Attributes:
        vector: `(P,)`, the parameter; TRPO may put new data into it.
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        self.module = _Logits(actor_critic)
        self.weights = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            self.vector = nn.Parameter(torch.cat([weight.reshape(-1) for weight in self.weights.values()]))

    def logits(self, states: States) -> Tensor:
        """Logits `(M, V)` as the vector has it; they may be differentiated twice."""
        return functional_call(self.module, self._views(), (states,))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the vector into the model."""
        for name, view in self._views().items():
            self.weights[name].copy_(view)

    def _views(self) -> dict[str, Tensor]:
        parts = self.vector.split([weight.numel() for weight in self.weights.values()])
        return {name: part.view_as(weight) for (name, weight), part in zip(self.weights.items(), parts, strict=True)}


class _Logits(nn.Module):
    """`ActorCritic.logits` as a forward pass, which `functional_call` wants.

    Only the language model is its submodule: `ActorCritic` holds the output embedding a second time, and a module that
    is found twice would be left with the vector's weights.
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__()
        self.lm = actor_critic.lm
        self.__dict__["logits"] = actor_critic.logits

    def forward(self, states: States) -> Tensor:
        logits: Tensor = self.__dict__["logits"](states)
        return logits
