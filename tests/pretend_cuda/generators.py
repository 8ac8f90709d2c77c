"""Random generators, which belong to a device and have states of its kind."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor

from .machine import machine, source_line

IN_PLACE = ("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_")
STATE_BYTES = 16
OTHER_NUMBERS = 0x5DEECE66D
"""Changes the seeds of generators on a GPU."""
_states: dict[bytes, Tensor] = {}
"""A CUDA generator's state has 16 bytes; here they are a name of the CPU generator's state that they stand for."""


class Generator(torch._C.Generator):
    """A generator of a device. On a GPU one seed gives other numbers than on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        new = super().__new__(cls, "cpu")
        new._place = machine.device(device)
        return new.manual_seed(new.initial_seed()) if new._place.type == "cuda" else new

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed ^ OTHER_NUMBERS if self._place.type == "cuda" else seed)
        return self

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self._place

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'torch._C.Generator' object")

    def get_state(self) -> Tensor:
        state = super().get_state()
        if self._place.type == "cpu":
            return state
        name = hashlib.md5(state.numpy().tobytes()).digest()
        _states[name] = state
        return torch.tensor(list(name), dtype=torch.uint8)

    def set_state(self, state: Tensor) -> Generator:
        if state.device.type != "cpu":
            raise TypeError("RNG state must be a torch.ByteTensor")
        if self._place.type == "cuda":
            if state.numel() != STATE_BYTES:
                raise RuntimeError("RNG state is wrong size")
            state = _states[bytes(state.tolist())]
        elif state.numel() == STATE_BYTES:
            size = super().get_state().numel()
            raise RuntimeError(f"RNG state is of size {STATE_BYTES}, but the CPU's generator expects {size}")
        super().set_state(state)
        return self


def patch() -> None:
    torch.Generator = Generator  # type: ignore[misc]
    for name in (*IN_PLACE, "multinomial", "bernoulli"):
        setattr(Tensor, name, drawing(getattr(Tensor, name)))
    for name in ("multinomial", "bernoulli", "poisson"):
        setattr(torch, name, drawing(getattr(torch, name)))


def drawing(real: Any) -> Any:
    @functools.wraps(real)
    def draw(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_generator(kwargs.get("generator"), self.device)
        return real(self, *args, **kwargs)

    return draw


def check_generator(generator: Any, device: torch.device) -> None:
    """Raises if a generator may not be drawn from on a device, or in the capture under way."""
    if generator is None:
        return
    if generator.device.type != device.type:
        raise RuntimeError(
            f"Expected a '{device.type}' device type for generator but found '{generator.device.type}' "
            f"at {source_line()}"
        )
    if device.type == "cuda" and machine.capture is not None and generator not in machine.capture.generators:
        raise RuntimeError(
            "Attempt to increase offset for a CUDA generator not in capture mode: register it with "
            f"register_generator_state (at {source_line()})"
        )


@functools.cache
def default_generator(index: int) -> Generator:
    """The one that `torch.cuda.manual_seed` seeds. Draws without a generator take the CPU's all the same."""
    return Generator(torch.device("cuda", index))
