"""Between host and device: `to`, `cpu`, `cuda`, `numpy`, `tolist`, and `torch.load`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .machine import CPU, machine
from .tensor import CudaTensor, plain, tagged, unpickled

_to, _numpy, _tolist, _load = Tensor.to, Tensor.numpy, Tensor.tolist, torch.load


def patch() -> None:
    Tensor.to, Tensor.cpu, Tensor.cuda = to, cpu, cuda  # type: ignore[method-assign]
    Tensor.numpy, Tensor.tolist = numpy, tolist  # type: ignore[method-assign]
    Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.load = load
    torch.serialization.add_safe_globals([unpickled])
    # `module.to` replaces the contents of parameters, since the tag is a type.
    torch.__future__.set_swap_module_params_on_conversion(True)


class Move(torch.autograd.Function):
    """A copy on another device, through which gradients flow back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        ctx.device = tensor.device
        return moved(tensor, device, non_blocking)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return moved(gradient, ctx.device), None, None


def moved(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """A copy on another device. The host waits for it unless it is told not to."""
    what = "a copy to the host" if device.type == "cpu" else "a copy to the device"
    if non_blocking:
        machine.refuse_in_capture(what)
    else:
        machine.wait(what)
    copied = plain(tensor).clone()
    if device.type == "cuda":
        return tagged(copied, device.index)
    if non_blocking:  # who reads it before the host has waited finds nothing sensible
        machine.unfinished.append((copied, copied.clone()))
        copied.fill_(torch.nan if copied.is_floating_point() else 99)
    return copied


def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, non_blocking, copy = understood(args, kwargs)
    result = self
    if device is not None and device.type not in ("cpu", "cuda"):
        return _to(self, device=device, dtype=dtype or self.dtype)
    if device is not None and device != self.device:
        copy = False
        if self.requires_grad and torch.is_grad_enabled():
            result = Move.apply(self, device, non_blocking)  # type: ignore[no-untyped-call]
        else:
            result = moved(self.detach(), device, non_blocking)
    layout = {"memory_format": kwargs["memory_format"]} if "memory_format" in kwargs else {}
    if copy or layout or (dtype is not None and dtype != result.dtype):
        result = _to(result, dtype=dtype or result.dtype, copy=copy, **layout)
    return result


def understood(args: Any, kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool, bool]:
    """Device, dtype, non_blocking and copy of a call of `to`, in any of its forms."""
    device, dtype, flags = kwargs.get("device"), kwargs.get("dtype"), []
    other = kwargs.get("other")
    for argument in args:
        if isinstance(argument, Tensor):
            other = argument
        elif isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, bool):
            flags.append(argument)
        elif argument is not None:
            device = argument
    if other is not None:
        device, dtype = other.device, other.dtype
    non_blocking, copy = (*flags, False, False)[:2]
    return machine.device(device), dtype, kwargs.get("non_blocking", non_blocking), kwargs.get("copy", copy)


def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return to(self, CPU)


def cuda(self: Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    return to(self, "cuda" if device is None else device, non_blocking=non_blocking)


def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(self, CudaTensor):
        self.__array__()
    return _numpy(self, *args, **kwargs)


def tolist(self: Tensor) -> Any:
    if isinstance(self, CudaTensor):
        machine.wait("tolist")
    return _tolist(plain(self))


def load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """`torch.load`: without `map_location`, what was saved on a GPU needs one."""
    place = None if callable(map_location) else machine.device(map_location)
    gpus, machine.gpus = machine.gpus, machine.gpus if place is None else 2**10  # no GPU is needed to map its tensors
    try:
        loaded = _load(file, map_location=map_location if place is None else "cpu", **kwargs)
    finally:
        machine.gpus = gpus
    return loaded if place is None else _placed(loaded, place)


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return type(value)((key, _placed(x, device)) for key, x in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_placed(x, device) for x in value)
    return value
