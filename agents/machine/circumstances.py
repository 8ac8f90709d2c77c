"""The software and hardware that a run's rounding depends on: saved in checkpoints and compared when a run resumes."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import textgym
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.devices import device_name


def machine(policy: ActorCritic) -> dict[str, Any]:
    """Return versions, processor, threads, device and precision; if one of them differs, floats may round differently.

    `ATEN_CPU_CAPABILITY` is the vector width that torch uses, and `MKL_CBWR` the code path that MKL uses.
    """
    return {
        "textgym": textgym.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "ATEN_CPU_CAPABILITY": torch.backends.cpu.get_cpu_capability(),
        "MKL_CBWR": os.environ.get("MKL_CBWR"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "device": device_name(policy.device),
        "dtype": str(policy.lm.dtype).removeprefix("torch."),
    }


def warn_of_differences(folder: Path, saved: dict[str, Any], policy: ActorCritic) -> None:
    """Warn once, naming each difference, if a checkpoint was saved with other software or hardware than the current."""
    now = machine(policy)
    differences = [f"{name} was {saved.get(name)} and is {now[name]}" for name in now if saved.get(name) != now[name]]
    moved = not saved["device"].startswith(policy.device.type)  # each kind of device has its own random generator
    if differences:
        warnings.warn(
            f"{folder} was saved under other circumstances ({'; '.join(differences)}), so the resumed run equals an "
            f"uninterrupted one only up to rounding{' and has other random numbers' if moved else ''}",
            stacklevel=3,
        )


def _processor() -> str:
    """Return the processor's name; on Linux from /proc/cpuinfo, because `platform` does not know it there."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
