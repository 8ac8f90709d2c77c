"""The machine: GPU, driver, versions, memory, bandwidth, and peak FLOP/s of matrix products."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from measuring.figures import note, start, tell
from measuring.peers import say
from measuring.roofline import bandwidth

from textgym.agents.machine.device_limits import peak_flops

PACKAGES = (
    "torch",
    "transformers",
    "gymnasium",
    "stable-baselines3",
    "sb3-contrib",
    "numpy",
    "accelerate",
    "tokenizers",
)
PEERS = ("bitsandbytes", "peft", "trl", "vllm", "liger-kernel", "flash-attn")
DEVICE_TESTS_AT_LEAST = (8, 0)
"""Compute capability from which kernels of bfloat16 and fused attention exist."""


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def processor() -> str:
    """Return the processor's name, if the system has it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, str]:
    """Return the description of the machine for the page of results."""
    found = {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "peers": ", ".join(f"{name} {version(name)}" for name in PEERS if version(name) != "-") or "none",
    }
    if device.type != "cuda":
        return {"device": str(device), **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "GPUs": str(torch.cuda.device_count()),
        **found,
    }


def main() -> None:
    device = start(__doc__)
    on_gpu = device.type == "cuda"
    say({"machine": describe(device)})
    if on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        tell("free memory", free / 2**30, "GiB", note=f"of {total / 2**30:.1f}")
        if free < total / 2:
            note("more than half of the memory is in use by other processes: what is measured may be theirs")
        if torch.cuda.get_device_capability(device) < DEVICE_TESTS_AT_LEAST:
            note("this GPU is older than Ampere: no bfloat16, and slower attention")
    tell("bandwidth of memory", bandwidth(device, 2048 if on_gpu else 64, 3) / 1e9, "GB/s", note="a = b + 2 c")
    half = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)  # most CPUs emulate it, slowly
    for dtype in (torch.float32, torch.bfloat16) if half else (torch.float32,):
        peak = peak_flops(device, dtype, 3 if on_gpu else 1)
        tell(f"matrix products in {dtype}".replace("torch.", ""), peak.flops / 1e12, "TFLOP/s", note=peak.how)


if __name__ == "__main__":
    main()
