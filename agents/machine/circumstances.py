"""What a run rests on besides its settings, such as versions and threads: saved in checkpoints, compared at resume."""

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
    """Return what is in force now, as plain values; where any of it differs, floats may round otherwise."""
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
    """Warn once, naming each difference, if a checkpoint was written under other circumstances than those of now."""
    now = machine(policy)
    differences = [f"{name} was {saved.get(name)} and is {now[name]}" for name in now if saved.get(name) != now[name]]
    moved = not saved["device"].startswith(policy.device.type)  # kinds of devices have different random generators
    if differences:
        warnings.warn(
            f"{folder} was saved under other circumstances ({'; '.join(differences)}), so the continued run equals an "
            f"undisturbed one only up to rounding{' and has other random numbers' if moved else ''}",
            stacklevel=3,
        )


def _processor() -> str:
    """The processor's name, which Linux alone tells in a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
