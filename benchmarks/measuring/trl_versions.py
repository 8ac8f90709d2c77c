"""Find a version of TRL: the installed one, or one that scripts/gpu/gpu.py has unpacked from a wheel."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from measuring.figures import skip

UNPACKED = Path(__file__).parents[2] / "build" / "gpu"


def libraries_with(module: str) -> tuple[Path, ...]:
    """Return the folders to put on the path so that TRL has a module: none if it is installed; else skip the part.

    Args:
        module: Name of a module of TRL, such as `"trl.trainer.grpo_trainer"`.
    """
    installed = importlib.util.find_spec("trl")
    is_there = installed is not None and installed.origin and has(Path(installed.origin).parents[1], module)
    folders = [folder for folder in UNPACKED.glob("trl-*") if has(folder, module)]
    if not is_there and not folders:
        skip(f"missing: trl with {module}; benchmarks/measuring/peers.py says how to get it")
    if importlib.util.find_spec("datasets") is None:
        skip("missing: datasets, which TRL needs; benchmarks/measuring/peers.py says how to get it")
    if is_there:
        return ()
    return (max(folders, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)]),)


def has(folder: Path, module: str) -> bool:
    """Return whether a folder of packages has a module, without importing its package."""
    path = folder / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()
