"""What a run needs from its environment to repeat itself bit for bit. Without torch, which reads it when it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def deterministic_environment(threads: int = 1) -> dict[str, str]:
    """Return the environment variables that bit-for-bit equality needs; what is set already stays as it is.

    They must be set before torch is imported: in the shell, or first of all in a script with
    `os.environ.update(textgym.deterministic_environment())`. `textgym.models.machine.seeding.deterministic()` then sets
    torch's side.

    Args:
        threads: of torch on the CPU. Sums are split among them, so another number rounds otherwise.
    """
    needed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_CBWR": _mkl_branch(),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # with the default one, products on two streams may add up in any order
    }
    return {name: os.environ.get(name) or value for name, value in needed.items()}


def prepare_environment(arguments: Sequence[str]) -> None:
    """Set what a bit-for-bit run needs if a command line asks for one; to be called before torch is imported."""
    if "--deterministic" in arguments:
        os.environ.update(deterministic_environment())


def missing_variables() -> dict[str, str]:
    """Return those of `deterministic_environment` that are not set."""
    return {name: value for name, value in deterministic_environment().items() if not os.environ.get(name)}


def _mkl_branch() -> str:
    """One branch of MKL's code, whatever the alignment of memory, without which products round differently each run.

    `COMPATIBLE` runs on every processor and takes about three times as long.
    """
    return "AVX2,STRICT" if "avx2" in _processor_flags() else "COMPATIBLE"


def _processor_flags() -> list[str]:
    """Instruction sets of this machine's processor, as far as Linux says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith("flags")]
    return flags[0].split() if flags else []
