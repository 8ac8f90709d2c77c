"""Configuration of the documentation site, which `make docs` builds."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import textgym

ROOT = Path(__file__).parents[1]

project = "textgym"
author = "the textgym developers"
version = release = textgym.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"textgym {version}"

# Headings are link targets, as on the hosting site: `environments.md#arguments`.
myst_heading_anchors = 3
# Links to files of the repository, such as `../examples/gym_make.py`, work there and have no page here.
suppress_warnings = ["myst.xref_missing"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"  # docstrings write `code` with single backticks, as Markdown does


def gymnasium_sections(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turns Gymnasium's Markdown headings in docstrings (`## Rewards`) into rubrics."""
    headings = {line: [f".. rubric:: {line[3:]}", ""] for line in lines if line.startswith("## ")}
    lines[:] = [new for line in lines for new in headings.get(line, [line])]


def line_of(path: str, name: str) -> int:
    """Return the line of a function, class or method, such as "PPO.loss", in a file of the repository.

    Raises:
        ValueError: If the file has none of this name, or more than one.
    """
    node: ast.AST = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [
            inner
            for inner in ast.walk(node)
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and inner is not node and inner.name == part
        ]
        if len(found) != 1:
            raise ValueError(f"{path} has {len(found) or 'no'} {name}")
        node = found[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return node.lineno


def show_lines(app: object, page: str, source: list[str]) -> None:
    """Names the lines of the places in the tables of methods, such as `agents/ppo.py:PPO.loss`, as they are now.

    The link is to the file alone: the site has the file as a download, which has no lines.
    """

    def shown(place: re.Match[str]) -> str:
        path, name = place.groups()
        return f"`{name}` in [{path}](../{path}), line {line_of(path, name)}"

    if page == "methods":
        source[0] = re.sub(r"`(\w[\w/]*\.py):([A-Za-z_][\w.]*)`(?= \|)", shown, source[0])


def setup(app: Any) -> None:
    """Sphinx calls this with the application."""
    app.connect("autodoc-process-docstring", gymnasium_sections, priority=0)
    app.connect("source-read", show_lines)
