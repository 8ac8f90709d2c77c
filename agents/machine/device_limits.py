"""What a device can do at most, and the most memory that was in use: what figures of a profile are measured by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Floating-point operations a second, and how they were measured."""

    flops: float
    how: str


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> Peak:
    """The fastest of several products of two large square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(repeats):
        started = _now(device)
        left @ right
        fastest = min(fastest, _now(device) - started)
    how = f"the fastest of {repeats} products of {size} x {size} matrices"
    if device.type == "cpu":
        how += f" in {torch.get_num_threads()} thread(s)"
    return Peak(2 * size**3 / fastest, how)


def reset_peak_memory(device: torch.device) -> None:
    """From now on `peak_memory` forgets what was before; on systems that cannot forget it does not."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at a time: allocated on a GPU, otherwise resident in this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 2**10
    import resource  # on a Mac

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
