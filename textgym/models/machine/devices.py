"""Devices by name, and the states of random generators, which differ from one kind of device to another."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any, TypedDict

import torch
from torch import Tensor

Device = torch.device | str | None


class GeneratorState(TypedDict):
    """State of a random generator: the kind of device that it draws on, `"cpu"` or `"cuda"`, and bytes on the CPU."""

    kind: str
    state: Tensor


def resolve_device(device: Device) -> torch.device:
    """Return the device that a name stands for, with its number, so that `"cuda"` and `"cuda:0"` compare equal.

    Args:
        device: `"cpu"`; `"cuda"`, the current GPU; `"cuda:1"`; or `"auto"`, the current GPU where there is one and the
            CPU elsewhere. `None` is the CPU.

    Raises:
        ValueError: the device is unknown, is not on this machine, or cannot be used in a forked process.
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
    """Return `resolve_device(device)`, and make it the current GPU if it is one, for all that asks for "cuda" alone."""
    found = resolve_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def device_name(device: torch.device) -> str:
    """Return a device and what it is: `"cuda:0 (NVIDIA H100 80GB HBM3)"`, or `"cpu"`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one for a block: graphs are captured, and streams made, on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_one_device(**devices: torch.device) -> None:
    """Check that parts that work together are on one device; they are named by the keywords.

    >>> check_one_device(policy=torch.device("cpu"), environment=torch.device("cpu"))

    Raises:
        ValueError: two of them are on different ones.
    """
    (first, here), *others = devices.items()
    for name, there in others:
        if there != here:
            raise ValueError(
                f"the {first} is on {str(here)!r} and the {name} on {str(there)!r}: make the {name} with "
                f"device={str(here)!r}, or move the {first} to {str(there)!r}"
            )


def check_fork(kind: str) -> None:
    """Check that this process may use this kind of device.

    Raises:
        ValueError: it is a forked child of a process that had used CUDA, where CUDA cannot start again.
    """
    if kind == "cuda" and torch.cuda._is_in_bad_fork():
        raise ValueError(
            "CUDA cannot be used in a forked process: start workers with the 'spawn' method "
            "(AsyncVectorEnv(context='spawn'), DataLoader(multiprocessing_context='spawn')), "
            "step all rows in this process with gym.make_vec(..., num_envs=...), or keep the workers on device='cpu'"
        )


def generator_state(generator: torch.Generator) -> GeneratorState:
    """Return the state of a generator, for `restore_generator`."""
    return {"kind": generator.device.type, "state": generator.get_state().cpu()}


def restore_generator(generator: torch.Generator, saved: GeneratorState) -> None:
    """Put a generator where `generator_state` found it, or one on another kind of device.

    Kinds of devices have different generators. On another kind the stream is seeded with a hash of the saved state, so
    that two runs that go on from one checkpoint still equal each other, though not the undisturbed run.
    """
    state = saved["state"].cpu()
    if saved["kind"] == generator.device.type:
        generator.set_state(state)
        return

    generator.manual_seed(seed_of(state))


def seed_of(state: Tensor) -> int:
    """Return a seed that follows from a generator's state."""
    digest = hashlib.sha256(bytes(state.tolist())).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits: CUDA's generator takes no negative numbers


def _gpu(device: torch.device) -> torch.device:
    check_fork("cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"there is no device {str(device)!r}: {_what_is_there()}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _what_is_there() -> str:
    """The devices of this machine, and what to pass."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gpus = "one GPU, 'cuda:0'" if count == 1 else f"{count} GPUs, 'cuda:0' to 'cuda:{count - 1}'"
        return f"this machine has {gpus}; pass one of these, 'cpu', or 'auto'"
    if (accelerator := _accelerator()) is not None:
        return f"this machine has {accelerator!r}; pass that, 'cpu', or 'auto'"
    why = "torch sees no GPU here" if torch.version.cuda else "this build of torch has no CUDA"
    return f"{why}; pass 'cpu', or 'auto', which takes a GPU where there is one"


def _accelerator() -> str | None:
    """The kind of this machine's accelerator, such as `"mps"`."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type
