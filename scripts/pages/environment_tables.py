"""Write the tables of arguments in docs/environments.md from `TextConfig` and `TextVectorConfig`.

    python scripts/pages/environment_tables.py

`tests/test_docs.py` fails if the page and the configs differ.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from pathlib import Path
from typing import Any

from textgym.envs.config import Rows, TextConfig

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
HEADER = "| argument | default | meaning |\n| --- | --- | --- |\n"


def table(config_class: Any) -> str:
    """Return a row for each field: its name, its default and its docstring up to the first blank line."""
    sentences = field_sentences(config_class)
    rows = [
        f"| `{field.name}` | {_default(field)} | {sentences[field.name]} |"
        for field in dataclasses.fields(config_class)
    ]
    return HEADER + "\n".join(rows) + "\n"


def field_sentences(config_class: type) -> dict[str, str]:
    """Return the docstring below each field, from the source, because Python does not keep it."""
    [body] = [node.body for node in ast.parse(textwrap.dedent(inspect.getsource(config_class))).body]
    return {
        statement.target.id: " ".join(below.value.value.split())
        for statement, below in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def with_tables(page: str) -> str:
    """Return the page with both tables updated from the configs."""
    before, one_row, many_rows = page.split(HEADER)
    rest_of = [part.partition("\n\n")[2] for part in (one_row, many_rows)]
    return f"{before}{table(TextConfig)}\n{rest_of[0]}{table(Rows)}\n{rest_of[1]}"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{field.default}`" if type(field.default).__name__ == "AutoresetMode" else f"`{field.default!r}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
