"""What a user is told when the GPU is out of memory: what took it, and what to lower."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from textgym.models.machine.devices import device_name

from .device_limits import peak_memory
from .memory_by_role import bytes_by_role, cache_bytes

SIZES = ("micro_batch_size", "minibatch_size", "batch_size", "episodes_per_update", "max_length")
"""Settings that need less memory when they are lower, those that change nothing else first."""
SWITCHES = ("gradient_checkpointing", "bf16", "adam_8bit")
"""Settings that need less memory when they are on."""


@contextmanager
def memory_explained(agent: Any) -> Iterator[None]:
    """Say what took the memory of a GPU and what to lower, where torch only says that there was not enough.

    Raises:
        MemoryError: the GPU was out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        device = agent.policy.device
        raise MemoryError(
            f"{device_name(device)} was out of memory in update {agent.updates + 1}. At the peak "
            f"{_parts(agent)}. {_advice(agent.config)}. The last checkpoint stays as it is, to resume from"
        ) from error


def _parts(agent: Any) -> str:
    """The peak by part, in GiB; what is neither weights nor caches are activations and what torch keeps in reserve."""
    peak = peak_memory(agent.policy.device)
    parts = {**bytes_by_role(agent), "key-value caches": cache_bytes(agent)}
    parts["activations and the rest"] = max(peak - sum(parts.values()), 0)
    listed = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items() if count)
    return f"{peak / 2**30:.2f} GiB were in use: {listed}"


def _advice(config: Any) -> str:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lower = [f"{name} (now {settings[name]})" for name in SIZES if name in settings]
    switch = [f"{name}=True" for name in SWITCHES if settings.get(name) is False]
    return f"Lower {' or '.join(lower)}" + (f", or set {', '.join(switch)}" if switch else "")
