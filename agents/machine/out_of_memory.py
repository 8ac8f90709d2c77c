"""Error message for a GPU that is out of memory: what used the memory, and which settings to lower."""

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
"""Settings that save memory when they are lower. The first one changes the results only by rounding."""
SWITCHES = ("gradient_checkpointing", "bf16", "adam_8bit")
"""Settings that save memory when they are on."""


@contextmanager
def memory_explained(agent: Any) -> Iterator[None]:
    """Replace torch's out-of-memory error by one that says what used the memory and which settings to lower.

    Raises:
        MemoryError: If the GPU is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        device = agent.policy.device
        raise MemoryError(
            f"{device_name(device)} was out of memory in update {agent.updates + 1}. At the peak "
            f"{_parts(agent)}. {_advice(agent.config)}. The last checkpoint is unchanged: resume from it"
        ) from error


def _parts(agent: Any) -> str:
    """Return the peak by part, in GiB; the rest are activations and memory that torch's allocator has reserved."""
    peak = peak_memory(agent.policy.device)
    parts = {**bytes_by_role(agent), "key-value caches": cache_bytes(agent)}
    parts["activations and the rest"] = max(peak - sum(parts.values()), 0)
    listed = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items() if count)
    return f"{peak / 2**30:.2f} GiB were in use: {listed}"


def _advice(config: Any) -> str:
    """Return which of the agent's settings to change."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lower = [f"{name} (now {settings[name]})" for name in SIZES if name in settings]
    switch = [f"{name}=True" for name in SWITCHES if settings.get(name) is False]
    return f"Lower {' or '.join(lower)}" + (f", or set {', '.join(switch)}" if switch else "")
