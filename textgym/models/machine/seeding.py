"""Repeatable runs: global random generators, and deterministic arithmetic."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from textgym.models.machine.determinism import missing_variables
from textgym.models.machine.devices import seed_of


def deterministic() -> None:
    """Make torch round the same way in every run on this machine: fixed threads, deterministic kernels, no TF32.

    Deterministic kernels may be slower, and an operation that has none raises an error.

    Raises:
        ValueError: If environment variables are missing that torch and MKL read when they start. See
            `textgym.deterministic_environment`.
    """
    if missing := missing_variables():
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        raise ValueError(
            f"bit-for-bit runs need environment variables before torch is imported: start with {settings}, "
            "or begin the script with `import os, textgym; os.environ.update(textgym.deterministic_environment())`"
        )
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")  # no TF32 in products
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # it chooses the fastest kernel by timing, which differs from run to run


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators in a block; afterwards restore all global generators.

    `transformers.Trainer` seeds Python's and NumPy's too, so these are restored as well.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (they belong to the caller)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # named, or it warns if there are several GPUs
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def global_generators() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch, as plain values and tensors."""
    state: Any = np.random.get_state()  # noqa: NPY002  (reward functions may use it)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python = random.getstate()
    return {
        "python": python,
        "numpy": [state[0], state[1].tolist(), *state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_global_generators(states: dict[str, Any]) -> None:
    """Restore the states of `global_generators`; a GPU without a saved state is seeded from the CPU's state."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device in range(torch.cuda.device_count()):
        if device < len(states["cuda"]):
            torch.cuda.set_rng_state(states["cuda"][device].cpu(), device)
        else:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(states["torch"]))
