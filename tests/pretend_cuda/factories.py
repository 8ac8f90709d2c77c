"""Functions of torch that make tensors from nothing, or from Python's values, where they are told to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .generators import check_generator
from .machine import CPU, machine
from .tensor import CudaTensor, plain, tagged

FROM_NOTHING = (
    *("zeros", "ones", "empty", "empty_strided", "empty_permuted", "full", "scalar_tensor", "eye"),
    *("arange", "range", "linspace", "logspace", "tril_indices", "triu_indices", "hann_window", "bartlett_window"),
    *("rand", "randn", "randint", "randperm", "normal"),
)
LIKE_ANOTHER = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
NEW = ("new_zeros", "new_ones", "new_empty", "new_full")
_pad_sequence = torch.nn.utils.rnn.pad_sequence
_tensor, _asarray, _as_tensor, _new_tensor = torch.tensor, torch.asarray, torch.as_tensor, Tensor.new_tensor


def patch() -> None:
    torch.get_default_device = default_device
    for name in (*FROM_NOTHING, *LIKE_ANOTHER):
        setattr(torch, name, factory(getattr(torch, name)))
    for name in NEW:
        setattr(Tensor, name, new(getattr(Tensor, name)))
    torch.tensor, torch.asarray, torch.as_tensor = tensor, asarray, as_tensor
    Tensor.new_tensor = new_tensor  # type: ignore[method-assign]
    torch.nn.utils.rnn.pad_sequence = pad_sequence


def default_device() -> torch.device:
    """That of the innermost `with torch.device(...)`; torch's own makes a tensor to find out."""
    contexts = (mode.device for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext))
    return next(contexts, CPU)


def factory(real: Any) -> Any:
    """One that takes `device="cuda"`."""

    @functools.wraps(real)
    def make(
        *args: Any, device: Any = None, pin_memory: bool = False, requires_grad: bool = False, **kwargs: Any
    ) -> Any:
        like = real.__name__.endswith("_like")
        if device is None and not like and default_device().type == "cuda":
            device = default_device()
        place = machine.device(device)
        if place is None or place.type != "cuda":
            check_generator(kwargs.get("generator"), place or CPU)
            if place is not None:
                args = (*map(host, args),)
                kwargs["device"] = place
            return real(*args, **kwargs).requires_grad_(requires_grad)
        check_generator(kwargs.get("generator"), place)
        args = (*map(host, args),)
        kwargs["device"] = CPU
        result = tagged(real(*args, **kwargs), place.index)
        record(result, real, args, kwargs)
        return result.requires_grad_(requires_grad)

    return make


def new(real: Any) -> Any:
    """A method such as `new_zeros`, which makes a tensor where another one is unless it is told to."""

    @functools.wraps(real)
    def make(self: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        place = machine.device(device)
        if place is None or place.type == "meta":
            return real(self, *args, **kwargs) if place is None else real(self, *args, device=place, **kwargs)
        args = (host(self), *args)
        result = real(*args, **kwargs)
        if place.type == "cuda":
            result = tagged(result, place.index)
            record(result, real, args, kwargs)
        return result

    return make


def record(result: Any, real: Any, args: Any, kwargs: Any) -> None:
    if machine.capture is not None and machine.capture.gpu == result._gpu:
        machine.capture.record(real, args, kwargs, [result], [], [])


def host(value: Any) -> Any:
    return plain(value) if isinstance(value, Tensor) else value


def tensor(
    data: Any, *, device: Any = None, pin_memory: bool = False, requires_grad: bool = False, **kwargs: Any
) -> Any:
    place = machine.device(device if device is not None else data.device if isinstance(data, Tensor) else None)
    place = place or default_device()
    if place.type == "meta":
        return _tensor(data, device=place, requires_grad=requires_grad, **kwargs)
    result = _tensor(host(data) if isinstance(data, Tensor) else values(data), **kwargs)
    return result.to(place).requires_grad_(requires_grad)


def values(data: Any) -> Any:
    """Python's values in place of tensors of one element, each of which the host waits for."""
    if isinstance(data, list | tuple):
        return [values(x) for x in data]
    return data.item() if isinstance(data, CudaTensor) and data.dim() == 0 else data


def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        place = machine.device(device) or default_device()
        return _as_tensor(values(data), dtype=dtype).to(place)
    return data.to(device=data.device if device is None else device, dtype=dtype or data.dtype)


def asarray(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
    if isinstance(data, Tensor):
        return as_tensor(data, dtype, device)
    result = _asarray(data, dtype=dtype, **kwargs)
    return result if device is None else result.to(device)


def new_tensor(self: Tensor, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Any:
    return tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)


def pad_sequence(
    sequences: Any, batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Tensor:
    """torch's own makes its result in C++, which takes these tensors for ones on the CPU."""
    if not any(sequence.is_cuda for sequence in sequences):
        return _pad_sequence(sequences, batch_first, padding_value, padding_side)
    longest = max(len(sequence) for sequence in sequences)
    rows = []
    for sequence in sequences:
        missing = longest - len(sequence)
        before, after = (missing, 0) if padding_side == "left" else (0, missing)
        sides = [0, 0] * (sequence.dim() - 1)
        rows.append(torch.nn.functional.pad(sequence, (*sides, before, after), value=padding_value))
    return torch.stack(rows, 0 if batch_first else 1)
