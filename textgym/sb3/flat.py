"""FlatWeights: the trainable weights of a policy's language model as one parameter, for TRPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.attention import States


class FlatWeights:
    """One vector in place of the language model's weights during a TRPO step.

    sb3-contrib's TRPO builds a separate graph for the gradient of every parameter, and differentiates through all of
    them for each product with the Fisher matrix, so its cost grows with the number of parameters. It also ignores
    parameters with `value` in their name, such as GPT-NeoX's `query_key_value` projections. One vector avoids both.

    Attributes:
        vector: `(P,)`, the parameter; TRPO may replace its data.
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        self.module = _Logits(actor_critic)
        self.weights = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            self.vector = nn.Parameter(torch.cat([weight.reshape(-1) for weight in self.weights.values()]))

    def logits(self, states: States) -> Tensor:
        """Return logits `(M, V)` with the weights of the vector; they can be differentiated twice."""
        return functional_call(self.module, self._views(), (states,))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the vector into the model's weights."""
        for name, view in self._views().items():
            self.weights[name].copy_(view)

    def _views(self) -> dict[str, Tensor]:
        parts = self.vector.split([weight.numel() for weight in self.weights.values()])
        return {name: part.view_as(weight) for (name, weight), part in zip(self.weights.items(), parts, strict=True)}


class _Logits(nn.Module):
    """`ActorCritic.logits` as the forward pass of a module, for `functional_call`.

    Only the language model is a submodule. `ActorCritic` has the output embedding a second time, and `functional_call`
    would not restore the weights of a module that it finds twice.
    """

    def __init__(self, actor_critic: ActorCritic) -> None:
        super().__init__()
        self.lm = actor_critic.lm
        self.__dict__["logits"] = actor_critic.logits

    def forward(self, states: States) -> Tensor:
        """Return logits `(M, V)`."""
        logits: Tensor = self.__dict__["logits"](states)
        return logits
