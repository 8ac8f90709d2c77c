"""Use this checkout without installing it: textgym on PYTHONPATH, and missing packages from a folder of wheels."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

# Name of the wheel of each package, by its import name.
REQUIRED = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "yaml": "pyyaml",
    "rich": "rich",
    "gymnasium": "gymnasium",
    "farama_notifications": "farama-notifications",
    "cloudpickle": "cloudpickle",
    "psutil": "psutil",
    "filelock": "filelock",
    "stable_baselines3": "stable-baselines3",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
    "pytest": "pytest",
}
OPTIONAL = {
    "sb3_contrib": "sb3-contrib",
    "bitsandbytes": "bitsandbytes",
    "peft": "peft",
    "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
    # What TRL needs. There may be wheels of two versions of TRL itself, because only 1.12 and older ones have PPO.
    "datasets": "datasets",
    "dill": "dill",
    "multiprocess": "multiprocess",
    "pyarrow": "pyarrow",
    "xxhash": "xxhash",
    "dateutil": "python-dateutil",
    "liger_kernel": "liger-kernel",
}


VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # images of NVIDIA set it to 1
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def missing(names: Iterable[str]) -> list[str]:
    """Return the packages that this Python does not find."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def folders(root: Path) -> list[Path]:
    """Return the folders of textgym, its benchmarks and unpacked wheels, which come before installed packages."""
    return [link_textgym(root), root / "benchmarks", unpacked(root)]


def unpacked(root: Path) -> Path:
    """Return the folder of unpacked wheels; `dill` takes modules of a folder with another name for the user's own."""
    return root / "build" / "gpu" / "site-packages"


def environment(root: Path) -> dict[str, str]:
    """Return the environment variables of a part: this checkout comes first, no network, no TF32."""
    paths = [*(str(folder) for folder in folders(root)), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def link_textgym(root: Path) -> Path:
    """Return a folder in which `textgym` has `textgym.agents` inside, as installed, and the metadata of its version."""
    folder = root / "build" / "gpu" / "checkout"
    package = folder / "textgym"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (root / "textgym").iterdir()} | {"agents": root / "agents"}
    wanted.pop("__pycache__", None)
    for link in package.iterdir():
        if link.is_symlink() and link.readlink() != wanted.get(link.name):  # a file is gone, or the checkout was moved
            link.unlink()
    for name, path in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(path)

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    metadata = folder / f"textgym-{project['version']}.dist-info"
    metadata.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.4", "Name: textgym", f"Version: {project['version']}"]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    scripts = [f"{name} = {target}" for name, target in project["scripts"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[console_scripts]", *scripts]) + "\n")
    return folder


def install_missing(wheels: str, root: Path) -> list[str]:
    """Unpack the wheels of missing packages into a folder; return lines that say what is still missing.

    Nothing is fetched, and what a wheel requires is not looked for: each package has to be among the wheels itself.
    """
    target = unpacked(root)
    if str(target) not in sys.path:
        sys.path.insert(0, str(target))
    names, lines = {**REQUIRED, **OPTIONAL}, []
    if wheels and not Path(wheels).is_dir():
        lines.append(f"no folder of wheels at {wheels}")
    elif wheels:
        found = [wheel_of(names[name], Path(wheels)) for name in missing(names)]
        lines += install([wheel for wheel in found if wheel is not None], target)
        for wheel in sorted(Path(wheels).glob("trl-*.whl")):
            lines += install([wheel], root / "build" / "gpu" / trl_folder(wheel.name))
        importlib.invalidate_caches()

    for group, what in ((REQUIRED, "parts that need it are skipped"), (OPTIONAL, "optional")):
        lines += [f"missing: {group[name]} ({what})" for name in missing(group)]
    return lines


def trl_folder(name: str) -> str:
    """Return the name of the folder of a version of TRL, from the name of its wheel.

    >>> trl_folder("trl-1.12.0-py3-none-any.whl")
    'trl-1.12.0'
    """
    return "-".join(name.split("-")[:2])


def wheel_of(package: str, wheels: Path) -> Path | None:
    """Return the wheel of a package."""
    stem = package.replace("-", "_")
    names = {path.name.lower().replace("-", "_"): path for path in sorted(wheels.glob("*.whl"))}
    return next((path for name, path in names.items() if name.startswith(f"{stem}_")), None)


def install(wheels: list[Path], target: Path) -> list[str]:
    """Install wheels in a folder, all at once; one by one, if one of them cannot be installed. Return what to say."""
    if not wheels:
        return []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--upgrade", "--target", str(target)]
    done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
    if done.returncode and len(wheels) > 1:
        return [line for wheel in wheels for line in install([wheel], target)]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        return [f"{wheels[0].name} cannot be installed: {why}"]
    return [f"{wheel.name}: installed" for wheel in wheels]
