"""Devices by name, and saving and restoring random generators across kinds of devices."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any, TypedDict

import torch
from torch import Tensor

Device = torch.device | str | None


class GeneratorState(TypedDict):
    """State of a random generator: the type of its device, such as `"cpu"` or `"cuda"`, and its bytes on the CPU."""

    kind: str
    state: Tensor


def resolve_device(device: Device) -> torch.device:
    """Return the device of a name, with its index, so that `"cuda"` and `"cuda:0"` compare equal.

    Args:
        device: `"cpu"`; `"cuda"`, the current GPU; `"cuda:1"`; or `"auto"`, the current GPU if there is one and the CPU
            otherwise. `None` is the CPU.

    Raises:
        ValueError: If the device is unknown, is not on this machine, or cannot be used in a forked process.
    """
    if device is None:
        return torch.device("cpu")

    if device == "auto":
        check_fork("cuda")
        device = "cuda" if torch.cuda.is_available() else "cpu"

    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {str(device)!r}: {_what_is_there()}") from error

    if found.type == "cpu":
        return torch.device("cpu")
    if found.type == "cuda":
        return _gpu(found)
    if found.type != _accelerator():
        raise ValueError(f"there is no device {str(device)!r}: {_what_is_there()}")
    return found


def use_device(device: Device) -> torch.device:
    """Return `resolve_device(device)`; a GPU becomes the current one, which other libraries use for `"cuda"`."""
    found = resolve_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def device_name(device: torch.device) -> str:
    """Return a device with the name of its hardware: `"cuda:0 (NVIDIA H100 80GB HBM3)"`, or `"cpu"`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one for a block, because torch captures graphs and makes streams on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_one_device(**devices: torch.device) -> None:
    """Check that objects that work together are on one device.

    >>> check_one_device(policy=torch.device("cpu"), environment=torch.device("cpu"))

    Args:
        devices: Device of each object, by the object's name in the error message.

    Raises:
        ValueError: If two of them are on different devices.
    """
    (first, here), *others = devices.items()
    for name, there in others:
        if there != here:
            raise ValueError(
                f"the {first} is on {str(here)!r} and the {name} on {str(there)!r}: make the {name} with "
                f"device={str(here)!r}, or move the {first} to {str(there)!r}"
            )


def check_fork(kind: str) -> None:
    """Check that this process can use this type of device.

    Raises:
        ValueError: If the type is `"cuda"` and a parent process used CUDA before it forked this one: CUDA cannot be
            initialised again in a forked process.
    """
    if kind == "cuda" and torch.cuda._is_in_bad_fork():
        raise ValueError(
            "CUDA cannot be used in a forked process: start workers with the 'spawn' method "
            "(AsyncVectorEnv(context='spawn'), DataLoader(multiprocessing_context='spawn')), "
            "step all rows in this process with gym.make_vec(..., num_envs=...), or keep the workers on device='cpu'"
        )


def generator_state(generator: torch.Generator) -> GeneratorState:
    """Return the state of a generator for `restore_generator`."""
    return {"kind": generator.device.type, "state": generator.get_state().cpu()}


def restore_generator(generator: torch.Generator, saved: GeneratorState) -> None:
    """Restore a state of `generator_state`, or seed from it if the generator is on another type of device.

    Types of devices have different algorithms, so a state is only valid on its own type. On another type the generator
    is seeded with a hash of the state: runs that resume from one checkpoint equal each other, but not the uninterrupted
    run.
    """
    state = saved["state"].cpu()
    if saved["kind"] == generator.device.type:
        generator.set_state(state)
        return

    generator.manual_seed(seed_of(state))


def seed_of(state: Tensor) -> int:
    """Return a seed that is a function of a generator's state."""
    digest = hashlib.sha256(bytes(state.tolist())).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits: CUDA's generator rejects negative seeds


def _gpu(device: torch.device) -> torch.device:
    check_fork("cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"there is no device {str(device)!r}: {_what_is_there()}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _what_is_there() -> str:
    """Return the devices of this machine and what to pass, for error messages."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gpus = "one GPU, 'cuda:0'" if count == 1 else f"{count} GPUs, 'cuda:0' to 'cuda:{count - 1}'"
        return f"this machine has {gpus}; pass one of these, 'cpu', or 'auto'"
    if (accelerator := _accelerator()) is not None:
        return f"this machine has {accelerator!r}; pass that, 'cpu', or 'auto'"
    why = "torch sees no GPU here" if torch.version.cuda else "this build of torch has no CUDA"
    return f"{why}; pass 'cpu', or 'auto', which takes a GPU where there is one"


def _accelerator() -> str | None:
    """Return the type of this machine's accelerator, such as `"mps"`."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type
