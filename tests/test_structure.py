"""Folders: which way their imports point, no circles, and few enough files to take in."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 15

# Imports go down this list and never up, those under TYPE_CHECKING and in functions too; folders of one line do not
# import each other. Games wrap environments, so they stand on the wrappers.
LAYERS = (
    "lazy errors announce",
    "option_pairs",
    "settings",
    "display",
    "data",
    "viewer",
    "models",
    "rewards",
    "envs",
    "sb3 wrappers",
    "games testing registration",
    "agents",
    "algorithms",
    "saved_flags help",
    "flags",
    "commands",
    "cli",
    "__main__",
)
# In agents/ the algorithms are the files at the top.
AGENT_LAYERS = ("callbacks", "configs", "machine", "common", "objectives", "engines", "", "runs", "watching", "search")
# Pairs (module, imported module) that point up until they are designed anew.
KNOWN: set[tuple[str, str]] = set()


def name_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "textgym" else ("textgym", *parts))


# `textgym/__init__.py` is left out: it names what all folders offer, and loads it when it is used.
FILES = {name_of(path): path for folder in ("textgym", "agents") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))}
del FILES["textgym"]


def imports_of(name: str) -> set[str]:
    """The modules that a module imports anywhere."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else source for module in names}
    return found & FILES.keys()


IMPORTS = {name: imports_of(name) for name in FILES}


def layer(name: str) -> tuple[int, int]:
    """Return the position of a module among the layers of textgym, and among those of agents."""
    parts = name.split(".")
    folder = parts[1]
    height = next(height for height, names in enumerate(LAYERS) if folder in names.split())
    if name == "textgym.agents":  # it names all that is in it, and nothing in it imports it
        return height, len(AGENT_LAYERS)
    inner = parts[2] if folder == "agents" and len(parts) > 2 and parts[2] in AGENT_LAYERS else ""
    return height, AGENT_LAYERS.index(inner) if folder == "agents" else 0


def may_import(name: str, imported: str) -> bool:
    if name.split(".")[1] == imported.split(".")[1]:
        return layer(imported) <= layer(name)
    return layer(imported)[0] < layer(name)[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name: str) -> None:
    upward = {imported for imported in IMPORTS[name] if not may_import(name, imported)}
    assert upward == {imported for module, imported in KNOWN if module == name}, f"{name} imports what is built on it"


def test_which_imports_are_allowed() -> None:
    assert may_import("textgym.models.loading", "textgym.data.corpora.sources")
    assert may_import("textgym.models.loading", "textgym.models.decoding.cached_decoder")
    assert not may_import("textgym.data.prompts", "textgym.models.loading")
    assert not may_import("textgym.sb3.policies", "textgym.wrappers.views")
    assert not may_import("textgym.wrappers.views", "textgym.games.gem")
    assert not may_import("textgym.envs.text", "textgym.testing")
    assert not may_import("textgym.testing", "textgym.agents")
    assert may_import("textgym.agents.ppo", "textgym.envs.vector")
    assert may_import("textgym.agents.ppo", "textgym.agents.common.rollout")
    assert not may_import("textgym.agents.common.rollout", "textgym.agents.ppo")
    assert not may_import("textgym.agents.common.rollout", "textgym.agents.runs.demo")
    assert may_import("textgym.cli", "textgym.agents")


@pytest.mark.parametrize("name", sorted(name for name in FILES if not name.startswith("textgym.envs")))
def test_only_the_environments_know_their_task(name: str) -> None:
    """Others ask an environment for what `textgym.envs.interface` lists."""
    reached = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "task" and "unwrapped" in ast.unparse(node.value)
    ]
    assert not reached, f"{name} reads {reached}"


def test_modules_do_not_import_each_other_in_circles() -> None:
    left = {name: set(imports) for name, imports in IMPORTS.items()}
    while free := [name for name, imports in left.items() if not imports]:  # what imports nothing is in no circle
        for name in free:
            del left[name]
        left = {name: imports - set(free) for name, imports in left.items()}
    assert not left, "each of these is in a circle, or imports a module that is"


@pytest.mark.parametrize(
    "files",
    [
        list(FILES.values()),
        list(ROOT.glob("tests/**/test_*.py")),
        list(ROOT.glob("scripts/**/*.py")),
        list(ROOT.glob("benchmarks/**/*.py")),
    ],
    ids=["code", "tests", "scripts", "benchmarks"],
)
def test_a_folder_is_small_enough_to_take_in(files: list[Path]) -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files)
    assert counts
    assert {folder: count for folder, count in counts.items() if count > MOST} == {}
