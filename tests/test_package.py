"""The package as a whole: what importing and installing it gives."""

from __future__ import annotations

import importlib
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


def output_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_neither_torch_nor_transformers() -> None:
    loaded = output_of("import sys, textgym; print(*sys.modules)").split()
    assert "textgym" in loaded
    assert not {"torch", "transformers", "stable_baselines3", "matplotlib"} & set(loaded)


def test_packages_are_found_after_importing_textgym_alone() -> None:
    code = "import sys, textgym; assert 'torch' not in sys.modules; print(textgym.viewer.token_html(['a']))"
    assert ">a</span>" in output_of(code)
    with pytest.raises(AttributeError, match="has no attribute 'viewers'"):
        _ = textgym.viewers  # type: ignore[attr-defined]


def test_import_costs_little_more_than_gymnasium() -> None:
    """Modules are counted, since times depend on other processes: none of another package, and few of ours."""
    code = "import sys, gymnasium; before = set(sys.modules); import textgym; print(*set(sys.modules) - before)"
    added = {name for name in output_of(code).split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert added == {"textgym", "textgym.lazy", "textgym.registration"}


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


@pytest.mark.parametrize("name", ["textgym", "textgym.agents", "textgym.rewards.models", "textgym.sb3"])
def test_names_that_are_loaded_on_first_use_are_listed_and_exist(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
