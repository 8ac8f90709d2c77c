"""Copy several tensors between host and device in one transfer, because the host waits for each transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one device on the CPU, after one copy; CPU tensors are returned unchanged."""
    return _moved(tensors, CPU)


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Return CPU tensors on a device, after one asynchronous copy; tensors of that device are returned unchanged."""
    return _moved(tensors, device)


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    if not tensors:
        return []
    here = tensors[0].device
    if here.type == device.type and device.index in (None, here.index):
        return list(tensors)
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)  # large items first keep all parts aligned
    packed = torch.cat([tensors[i].detach().contiguous().flatten().view(torch.uint8) for i in order])
    uploads = here.type == "cpu" and device.type == "cuda"
    if uploads:
        packed = packed.pin_memory()  # a copy from pageable memory would wait for all work on the device
    parts = packed.to(device, non_blocking=uploads).split([tensors[i].nbytes for i in order])
    moved = {i: part.view(tensors[i].dtype).view(tensors[i].shape) for i, part in zip(order, parts, strict=True)}
    return [moved[i] for i in range(len(tensors))]
