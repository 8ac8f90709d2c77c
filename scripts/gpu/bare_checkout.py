"""Use this checkout without installing it: textgym on PYTHONPATH, and missing packages from a folder of wheels."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
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
        folder = Path(wheels)
        found = [names[name] for name in missing(names) if has_wheel(names[name], folder)]
        lines += install(found, folder, target)
        for requirement in sorted({trl_version(wheel.name) for wheel in folder.glob("trl-*.whl")}):
            trl = root / "build" / "gpu" / requirement.replace("==", "-")
            if not trl.is_dir():
                lines += install([requirement], folder, trl)
        importlib.invalidate_caches()

    for group, what in ((REQUIRED, "parts that need it are skipped"), (OPTIONAL, "optional")):
        lines += [f"missing: {group[name]} ({what})" for name in missing(group)]
    return lines


def trl_version(name: str) -> str:
    """Return what pip calls a version of TRL, from the name of its wheel.

    >>> trl_version("trl-1.12.0-py3-none-any.whl")
    'trl==1.12.0'
    """
    return "==".join(name.split("-")[:2])


def has_wheel(package: str, wheels: Path) -> bool:
    """Return whether a folder has a wheel of a package, for this Python or another one."""
    return any(plain(path.name.split("-")[0]) == plain(package) for path in wheels.glob("*.whl"))


def plain(package: str) -> str:
    """Return the name of a package as pip compares it.

    >>> plain("Farama_Notifications")
    'farama-notifications'
    """
    return re.sub(r"[-_.]+", "-", package).lower()


def install(packages: list[str], wheels: Path, target: Path) -> list[str]:
    """Install packages in a folder, all at once; one by one, if one cannot be installed. Return what to say.

    pip gets their names, so that it takes the wheels for this Python and machine.
    """
    if not packages:
        return []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    command += ["--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode and len(packages) > 1:
        return [line for package in packages for line in install([package], wheels, target)]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        return [f"{packages[0]} cannot be installed: {why}"]
    return [f"{package}: installed" for package in packages]
