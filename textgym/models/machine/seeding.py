"""Runs that repeat themselves: the random numbers that everybody shares, and arithmetic that always rounds alike."""

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
    """Make torch round alike in every run on this machine: the same threads, kernels and precision.

    Deterministic kernels may be slower, and an operation that has none raises an error.

    Raises:
        ValueError: the environment lacks what torch and MKL read when they start, see
            `textgym.deterministic_environment`.
    """
    if missing := missing_variables():
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        raise ValueError(
            f"bit-for-bit runs need variables of the environment before torch is imported: start with {settings}, "
            "or begin the script with `import os, textgym; os.environ.update(textgym.deterministic_environment())`"
        )
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")  # no TF32 in products
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # which would choose the kernel that was fastest this time


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, which `transformers.Trainer` does too, and puts them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (others' generators, kept for them)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # it warns of several unless they are named
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def global_generators() -> dict[str, Any]:
    """States of the generators that everybody shares: Python's, NumPy's and torch's; plain values and tensors."""
    state: Any = np.random.get_state()  # noqa: NPY002  (reward functions may draw from it)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python = random.getstate()
    return {
        "python": python,
        "numpy": [state[0], state[1].tolist(), *state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_global_generators(states: dict[str, Any]) -> None:
    """Puts them back where `global_generators` found them; a GPU that was not there begins where the CPU's went on."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device in range(torch.cuda.device_count()):
        if device < len(states["cuda"]):
            torch.cuda.set_rng_state(states["cuda"][device].cpu(), device)
        else:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(states["torch"]))
