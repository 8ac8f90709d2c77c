"""Peak FLOP/s and peak memory of a device, which profiles and error messages report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Peak floating-point operations per second, and how they were measured."""

    flops: float
    how: str


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> Peak:
    """Measure the peak FLOP/s: the fastest of several products of two large square matrices.

    Args:
        device: Device to measure.
        dtype: Data type of the matrices.
        repeats: Number of products.
    """
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
    """Reset the peak that `peak_memory` returns; does nothing for the CPU on systems without /proc."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets the peak resident set size, see proc(5)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated memory on a GPU, otherwise resident memory of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 2**10
    import resource  # macOS has no /proc; Windows has no `resource`

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
