"""Runs the examples in the docstrings.

`pytest --doctest-modules` would import `agents/` a second time under its folder's name; here every module is imported
by the name it is installed under.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_with_examples() -> list[str]:
    files = [*ROOT.glob("textgym/**/*.py"), *ROOT.glob("agents/**/*.py")]
    paths = [file.relative_to(ROOT).with_suffix("") for file in files if ">>> " in file.read_text(encoding="utf-8")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return sorted(f"textgym.{name}" if name.startswith("agents") else name for name in names)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert attempted > 0
    assert failed == 0, "see the captured output"
