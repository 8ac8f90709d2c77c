"""The package as a whole: what importing and installing it gives, and which way its imports point."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest

import textgym

ROOT = Path(__file__).parents[1]
PACKAGES = ["textgym", "agents"]
MODULES = sorted(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))

# A module imports from its own folder and from those before it. What stands beside the folders (registration, testing,
# ...) may use all of textgym; the command line sits on top of everything.
# `textgym/__init__.py` is left out: it names what all of them offer, and loads it when it is used.
LAYERED = [path for path in MODULES if path != ROOT / "textgym" / "__init__.py"]
LAYERS = {"data": 0, "models": 1, "rewards": 2, "envs": 3, "sb3": 4, "wrappers": 4}
BESIDE, AGENTS, COMMAND_LINE = 5, 6, 7


def output_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_neither_torch_nor_transformers() -> None:
    loaded = output_of("import sys, textgym; print(*sys.modules)").split()
    assert "textgym" in loaded
    assert not {"torch", "transformers", "stable_baselines3", "matplotlib"} & set(loaded)


def test_import_costs_little_more_than_gymnasium() -> None:
    """Counted in modules, since a busy machine is slow at anything: none of another package, and few of ours."""
    code = "import sys, gymnasium; before = set(sys.modules); import textgym; print(*set(sys.modules) - before)"
    added = {name for name in output_of(code).split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert added == {"textgym", "textgym.registration"}


@pytest.mark.parametrize("name", textgym.__all__)
def test_public_names_load(name: str) -> None:
    assert getattr(textgym, name).__name__ == name


def test_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata("textgym")["Version"] == textgym.__version__ == project["version"]
    assert metadata("textgym")["Requires-Python"] == ">=3.11"
    assert metadata("textgym")["License-Expression"] == "Apache-2.0"
    (command,) = entry_points(group="console_scripts", name="textgym")
    assert command.value == "textgym.__main__:main"


def test_direct_dependencies_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    direct = {requirement.partition(">=")[0].partition("==")[0] for group in groups for requirement in group}
    assert direct <= pinned


def test_list_of_packages_is_complete() -> None:
    folders = {path.parent.relative_to(ROOT).parts for path in MODULES}
    names = {".".join(parts) for parts in folders}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(f"textgym.{name}" if name.startswith("agents") else name for name in names)


def test_wheel_holds_both_packages_and_their_data(tmp_path: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()
    }
    expected = {name for name in files if "__pycache__" not in name}
    assert held == {f"textgym/{name}" if name.startswith("agents/") else name for name in expected}


def test_agents_are_not_installed_at_top_level(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('agents'), u.find_spec('textgym.agents').origin)"
    result = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith("None ")


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    module = installed_name(path)
    upward = {name for name in imported_modules(path) if not may_import(module, name)}
    assert not upward, f"{module} imports what is built on it"


def test_layering_rule() -> None:
    assert may_import("textgym.models.loading", "textgym.data.sources")
    assert may_import("textgym.models.loading", "textgym.models.decoding.cached_decoder")
    assert not may_import("textgym.data.prompts", "textgym.models.loading")
    assert not may_import("textgym.sb3.policies", "textgym.wrappers.flat")
    assert not may_import("textgym.envs.text", "textgym.testing")
    assert not may_import("textgym.testing", "textgym.agents")
    assert may_import("textgym.agents.ppo", "textgym.envs.vector")
    assert may_import("textgym.cli", "textgym.agents")


def may_import(module: str, imported: str) -> bool:
    if imported == "textgym" or (layer(module) == layer(imported) and folder(module) == folder(imported)):
        return True
    return layer(imported) < layer(module)


def folder(module: str) -> str:
    """The part of the name after `textgym.`, or nothing for the modules that stand beside the folders."""
    name = module.split(".")[1]
    return name if name in LAYERS or name == "agents" else ""


def layer(module: str) -> int:
    name = module.split(".")[1]
    on_top = dict.fromkeys(("cli", "flags", "__main__"), COMMAND_LINE)
    return {**LAYERS, "agents": AGENTS, **on_top}.get(name, BESIDE)


def imported_modules(path: Path) -> set[str]:
    """Names of our modules that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    package = installed_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from textgym import envs` names a folder; `from textgym import TextEnv` counts as something beside them.
            found |= {f"{source}.{alias.name}" for alias in node.names} if source == "textgym" else {source}
    return {name for name in found if name.split(".")[0] == "textgym"}


def installed_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "textgym" else ("textgym", *parts))
