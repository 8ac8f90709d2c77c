"""Environment variables of bit-for-bit repeatable runs; without importing torch, which reads them when it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def deterministic_environment(threads: int = 1) -> dict[str, str]:
    """Return the environment variables that bit-for-bit equality needs; variables that are set keep their values.

    A value of `MKL_CBWR` that leaves rounding to alignment, such as `AUTO` or `AVX2` without `STRICT`, is replaced.

    They must be set before torch is imported: in the shell, or in the first lines of a script with
    `os.environ.update(textgym.deterministic_environment())`. `textgym.models.machine.seeding.deterministic()` then sets
    torch's own switches.

    Args:
        threads: Number of torch's CPU threads. They split sums, so another number of threads rounds differently.
    """
    needed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_CBWR": _mkl_branch(),
        # With cuBLAS's default workspace, sums of matrix products on several streams have no fixed order:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return needed | {name: os.environ[name] for name in needed if _serves(name, os.environ.get(name, ""))}


def prepare_environment(arguments: Sequence[str]) -> None:
    """Set the variables if a command line has `--deterministic`; call it before torch is imported."""
    if "--deterministic" in arguments:
        os.environ.update(deterministic_environment())


def missing_variables() -> dict[str, str]:
    """Return the variables of `deterministic_environment` that are not set, or not to what equal bits need."""
    return {name: value for name, value in deterministic_environment().items() if os.environ.get(name) != value}


def _serves(name: str, value: str) -> bool:
    """Return whether equal bits can be had with the value that a variable has."""
    if name == "MKL_CBWR":
        return value == "COMPATIBLE" or value.endswith(",STRICT")
    return bool(value)


def _mkl_branch() -> str:
    """Return the value of MKL_CBWR: one code path of MKL, with the same rounding for every alignment of memory.

    Without it MKL chooses by alignment, which differs from run to run. `COMPATIBLE` works on every processor and takes
    about three times as long as `AVX2,STRICT`.
    """
    return "AVX2,STRICT" if "avx2" in _processor_flags() else "COMPATIBLE"


def _processor_flags() -> list[str]:
    """Return the instruction sets of this machine's processor; empty if it is not Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith("flags")]
    return flags[0].split() if flags else []
