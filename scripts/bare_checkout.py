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
    "stable_baselines3": "stable-baselines3",
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
    "pytest": "pytest",
}
OPTIONAL = {
    "sb3_contrib": "sb3-contrib",
    "bitsandbytes": "bitsandbytes",
    "trl": "trl",
    "datasets": "datasets",
    "peft": "peft",
}


def missing(names: Iterable[str]) -> list[str]:
    """Return the packages that this Python does not find."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def folders(root: Path) -> list[Path]:
    """Return the folders of textgym, its benchmarks and unpacked wheels, which come before installed packages."""
    return [link_textgym(root), root / "benchmarks", root / "build" / "gpu" / "wheels"]


def environment(root: Path) -> dict[str, str]:
    """Return the environment variables of a part: this checkout comes first, no network."""
    paths = [*(str(folder) for folder in folders(root)), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def link_textgym(root: Path) -> Path:
    """Return a folder in which `textgym` has `textgym.agents` inside, as installed, and the metadata of its version."""
    folder = root / "build" / "gpu" / "checkout"
    package = folder / "textgym"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (root / "textgym").iterdir()} | {"agents": root / "agents"}
    for link in package.iterdir():
        if link.is_symlink() and link.name not in wanted:
            link.unlink()
    for name, path in wanted.items():
        if name != "__pycache__" and not (package / name).is_symlink():
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
    """Unpack the wheels of missing packages into build/gpu/wheels; return lines that say what is still missing.

    Nothing is fetched, and what a wheel requires is not looked for: each package has to be among the wheels itself.
    """
    target = root / "build" / "gpu" / "wheels"
    if str(target) not in sys.path:
        sys.path.insert(0, str(target))
    lines = []
    if wheels and not Path(wheels).is_dir():
        lines.append(f"no folder of wheels at {wheels}")
    elif wheels:
        for name in missing({**REQUIRED, **OPTIONAL}):
            package = {**REQUIRED, **OPTIONAL}[name]
            if installed := install(package, Path(wheels), target):
                lines.append(f"{package}: {installed}")
        importlib.invalidate_caches()

    for names, what in ((REQUIRED, "parts that need it are skipped"), (OPTIONAL, "optional")):
        lines += [f"missing: {names[name]} ({what})" for name in missing(names)]
    return lines


def install(package: str, wheels: Path, target: Path) -> str:
    """Install a package from its wheel, if there is one; return what to say of it."""
    stem = package.replace("-", "_")
    if not any(path.name.lower().replace("-", "_").startswith(f"{stem}_") for path in wheels.glob("*.whl")):
        return ""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--find-links",
        str(wheels),
    ]
    done = subprocess.run([*command, "--target", str(target), package], capture_output=True, text=True)
    if done.returncode:
        return "its wheel cannot be installed: " + (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return f"installed from {wheels}"
