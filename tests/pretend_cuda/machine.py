"""The pretend machine: its GPUs, the current one, a capture under way, and when the host waited for the device."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
PROJECT = ("/textgym/", "/agents/")


@dataclass
class Machine:
    """What the parts of the pretend device share.

    Attributes:
        gpus: how many there are; tests may change it.
        current: index of the current one.
        capture: the CUDA graph that is being captured.
        syncs: how often the host waited for the device, by what for and the project's source line.
        uneven_sums: how far cumulative sums rise and fall where nothing is added, as a share. CUDA adds up in blocks
            (pytorch#21780) and is off by rounding alone; tests exaggerate it.
        unfinished: copies to the host that nobody has waited for yet, as (destination, source).
    """

    gpus: int = 1
    current: int = 0
    capture: Any = None
    syncs: Counter[str] = field(default_factory=Counter)
    uneven_sums: float = 0.0
    unfinished: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def wait(self, what: str) -> None:
        """The host waits until the device has done everything."""
        self.refuse_in_capture(what)
        self.syncs[f"{what} at {source_line()}"] += 1
        for destination, source in self.unfinished:
            destination.copy_(source)
        self.unfinished.clear()

    def refuse_in_capture(self, what: str) -> None:
        """Raises what CUDA does if a graph is being captured."""
        if self.capture is not None:
            raise torch.AcceleratorError(
                f"CUDA error: operation not permitted when stream is capturing ({what} at {source_line()})"
            )

    def device(self, place: Any) -> torch.device | None:
        """A device as torch understands it: `"cuda"` and a number are one with an index.

        Raises:
            RuntimeError: there is no such GPU.
        """
        if place is None:
            return None
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        if device.type != "cuda":
            return device
        if self.gpus == 0:
            raise RuntimeError("No CUDA GPUs are available")
        index = self.current if device.index is None else device.index
        if index >= self.gpus:
            raise torch.AcceleratorError(f"CUDA error: invalid device ordinal (cuda:{index} of {self.gpus})")
        return torch.device("cuda", index)


machine = Machine()


def source_line() -> str:
    """The innermost line of textgym that is running, and the line of a library that it called, if there is one."""
    library, frame = "", sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages/" in name:
            short = name.split("site-packages/")[-1]
            library = library or (f" ({short}:{frame.f_lineno})" if not short.startswith("torch/") else "")
        elif "/tests/" not in name and any(folder in name for folder in PROJECT):
            return f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}{library}"
        frame = frame.f_back
    return f"a test{library}"
