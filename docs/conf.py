"""Configuration of the documentation site, which `make docs` builds."""

from __future__ import annotations

from typing import Any

import textgym

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


def setup(app: Any) -> None:
    """Sphinx calls this with the application."""
    app.connect("autodoc-process-docstring", gymnasium_sections, priority=0)
