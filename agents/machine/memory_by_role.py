"""Memory of an agent's tensors by role (policy, critic, optimiser, ...), of key-value caches and of activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from textgym.models.token_model import TokenModel


def bytes_by_role(agent: Any) -> dict[str, int]:
    """Return the bytes of weights, optimiser state and gradients by role; shared tensors count for the first role.

    Args:
        agent: Any agent. One with a KL penalty has a reference, reward models and its own optimiser; SFT and DPO have a
            trainer, which has the optimiser.
    """
    policy = agent.policy
    roles: dict[str, Iterable[Tensor]] = {
        "policy": _weights([policy.lm]),
        "critic": _weights([policy.value_head] if policy.critic is None else [policy.critic, policy.value_head]),
    }
    if hasattr(agent, "penalty"):
        others = [module for module in vars(agent).values() if isinstance(module, nn.Module) and module is not policy]
        roles["reference"] = _weights([agent.penalty.reference.lm])
        roles["reward model"] = _weights(_reward_models(agent))
        roles["other models"] = _weights(others)
    optimizer = getattr(agent if hasattr(agent, "penalty") else agent.trainer, "optimizer", None)
    if optimizer is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        roles["optimiser"] = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        roles["gradients"] = [weight.grad for weight in weights if weight.grad is not None]
    seen: set[int] = set()
    return {role: _size(tensors, seen) for role, tensors in roles.items()}


def cache_bytes(agent: Any) -> int:
    """Return the bytes of all key-value caches."""
    models = {id(model): model for model in vars(agent).values() if isinstance(model, TokenModel)}
    if hasattr(agent, "penalty"):
        models[id(agent.penalty.reference)] = agent.penalty.reference
    return sum(model.cache_bytes for model in models.values())


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Context manager that counts the bytes of activations: tensors that autograd saves for the backward pass.

    Weights are not activations, so they do not count. A tensor that several nodes save counts once.

    Args:
        weights: Tensors that do not count.

    Attributes:
        peak: The peak number of bytes so far.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weight_storages = {weight.untyped_storage().data_ptr() for weight in weights}
        self.references: dict[int, int] = {}  # number of nodes that save a storage, by its address
        self.bytes = self.peak = 0
        super().__init__(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor)

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that a node of the graph saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.weight_storages:
            return
        references = self.references.get(storage.data_ptr(), 0)
        self.references[storage.data_ptr()] = references + 1
        self.bytes += 0 if references else storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def release(self, tensor: Tensor) -> None:
        """Stop counting a tensor, whose node was freed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.weight_storages:
            return
        self.references[storage.data_ptr()] -= 1
        if not self.references[storage.data_ptr()]:
            del self.references[storage.data_ptr()]
            self.bytes -= storage.nbytes()


class _Saved:
    """A tensor that a node of autograd's graph saves, from the forward pass until the node is freed."""

    def __init__(self, tensor: Tensor, count: SavedForBackward) -> None:
        self.tensor, self.count = tensor.detach(), count
        count.hold(tensor)

    def __del__(self) -> None:
        self.count.release(self.tensor)


def _weights(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _reward_models(agent: Any) -> list[nn.Module]:
    functions: list[Any] = agent.base_env.scorer.functions
    parts = [part for function in functions for part in (function, *getattr(function, "__dict__", {}).values())]
    return [part for part in parts if isinstance(part, nn.Module)]


def _size(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
