"""Check that training changed the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from textgym.errors import UnchangedWeightsError


class ChangedWeights(TrainerCallback):
    """Callback that checks at the end of a `transformers.Trainer` that some weight changed.

    Raises:
        UnchangedWeightsError: If none did, although updates were made.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Remember the weights by their checksums."""
        assert model is not None
        self.updates, self.before = state.global_step, checksums(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Compare the weights with those at the beginning."""
        assert model is not None
        updates = state.global_step - self.updates
        if updates and torch.equal(checksums(model), self.before):
            raise UnchangedWeightsError(
                f"training ended after {updates} updates, and no weight has changed: look for a learning rate of 0, "
                "for weights in a precision that small updates are lost in, or for data whose gradient is 0"
            )


@torch.no_grad()
def checksums(module: nn.Module) -> Tensor:
    """Return a hash of the bits of each trained weight, `(W,)`; of the own shards, if weights are sharded."""
    trained = [weight.detach() for weight in module.parameters() if weight.requires_grad]
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
    return torch.stack([torch.hash_tensor(weight).cpu() for weight in own])
