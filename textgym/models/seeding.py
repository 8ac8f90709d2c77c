"""The random numbers that everybody shares: seeds that leave them as they were, and their states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


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
    """Puts them back where `global_generators` found them."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
