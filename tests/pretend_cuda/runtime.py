"""`torch.cuda` and `torch.accelerator` as they are with GPUs, and autocast on them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .generators import default_generator
from .machine import machine

NAME = "Pretend H100"
MEMORY = 2**36
_autocast_init = torch.amp.autocast_mode.autocast.__init__
_grouped = torch._C._group_tensors_by_device_and_dtype


def patch() -> None:
    for name, function in {**device_functions(), **memory_functions(), **random_functions()}.items():
        setattr(torch.cuda, name, function)
    for name, function in random_functions().items():
        setattr(torch.cuda.random, name, function)
    for name, function in accelerator_functions().items():
        setattr(torch.accelerator, name, function)
    torch.cuda.device, torch.cuda.Stream, torch.cuda.Event = CurrentDevice, Stream, Event  # type: ignore[misc,assignment]
    torch.backends.cuda.is_built = lambda: True
    torch.version.cuda = "12.8"
    torch.amp.autocast_mode.autocast.__init__ = autocast_init  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        setattr(torch, name, of_the_cpu(getattr(torch, name)))
    torch._C._group_tensors_by_device_and_dtype = grouped


def device_functions() -> dict[str, Any]:
    return {
        "is_available": lambda: machine.gpus > 0,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: machine.gpus,
        "current_device": lambda: machine.current,
        "set_device": set_device,
        "synchronize": lambda device=None: machine.wait("synchronize"),
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: machine.capture is not None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: Properties(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "ipc_collect": lambda: None,
    }


def memory_functions() -> dict[str, Any]:
    names = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        **{name: lambda device=None: 0 for name in names},
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    }


def random_functions() -> dict[str, Any]:
    def generator(device: Any = "cuda") -> Any:
        place = machine.device(device)
        assert place is not None
        return default_generator(place.index)

    def seed_all(seed: int) -> None:
        for index in range(machine.gpus):
            default_generator(index).manual_seed(int(seed))

    return {
        "get_rng_state": lambda device="cuda": generator(device).get_state(),
        "set_rng_state": lambda state, device="cuda": generator(device).set_state(state),
        "get_rng_state_all": lambda: [generator(index).get_state() for index in range(machine.gpus)],
        "set_rng_state_all": lambda states: [generator(i).set_state(state) for i, state in enumerate(states)],
        "manual_seed": lambda seed: generator().manual_seed(int(seed)),
        "manual_seed_all": seed_all,
        "initial_seed": lambda: generator().initial_seed(),
    }


def accelerator_functions() -> dict[str, Any]:
    return {
        "is_available": lambda: machine.gpus > 0,
        "device_count": lambda: machine.gpus,
        "current_accelerator": lambda check_available=False: torch.device("cuda") if machine.gpus else None,
        "current_device_index": lambda: machine.current,
        "set_device_index": set_device,
        "current_stream": Stream,
        "synchronize": lambda device=None: machine.wait("synchronize"),
        "empty_cache": lambda: None,
    }


def set_device(device: Any) -> None:
    place = machine.device(device)
    if place is not None:
        machine.current = place.index


class CurrentDevice:
    """`torch.cuda.device`: another GPU is the current one inside."""

    def __init__(self, device: Any) -> None:
        place = machine.device(device)
        self.index = machine.current if place is None or place.type != "cuda" else place.index

    def __enter__(self) -> None:
        self.before, machine.current = machine.current, self.index

    def __exit__(self, *error: Any) -> None:
        machine.current = self.before


class Stream:
    """A stream; here there is one, in which everything is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def is_capturing(self) -> bool:
        return machine.capture is not None

    def synchronize(self) -> None:
        machine.wait("a stream")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Event:
    """A place in the stream that the host can wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        machine.wait("an event")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Properties:
    """What a GPU says about itself."""

    name, major, minor, total_memory, multi_processor_count = NAME, 9, 0, MEMORY, 132


def autocast_init(
    self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
) -> None:
    """The CPU's autocast in place of CUDA's, in bfloat16 where that is in float16."""
    if device_type == "cuda":
        device_type = "cpu"
        dtype = torch.bfloat16 if dtype in (None, torch.float16) else dtype
    _autocast_init(self, device_type, dtype, enabled, cache_enabled)


def of_the_cpu(real: Any) -> Any:
    def ask(*args: Any) -> Any:
        return real(*("cpu" if argument == "cuda" else argument for argument in args))

    return ask


def grouped(tensors: Any, with_indices: bool = False) -> Any:
    """Optimisers and clipping group weights by device, which C++ takes for the CPU."""
    groups = _grouped(tensors, with_indices)
    return {(_device(lists[0], device), dtype): (lists, i) for (device, dtype), (lists, i) in groups.items()}


def _device(tensors: list[Tensor | None], otherwise: torch.device) -> torch.device:
    return next((tensor.device for tensor in tensors if tensor is not None), otherwise)
