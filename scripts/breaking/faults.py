"""The faults that can be planted in a file: another operator, comparison, condition or constant."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
"""Operators and comparisons, and what replaces each."""


@dataclass(frozen=True)
class Fault:
    """A fault at one place.

    Attributes:
        path: The file, relative to the repository.
        line: Line number.
        statement: First and last line of the statement; of a compound one, such as `if`, up to its body.
        before: The expression as it is.
        after: The expression as it becomes.
        source: The whole file with the fault.
    """

    path: str
    line: int
    statement: tuple[int, int]
    before: str
    after: str
    source: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node may become: the same with another operator, condition or constant."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not isinstance(node.left, ast.JoinedStr):
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


def annotations(tree: ast.AST) -> set[int]:
    """Return the ids of nodes that do not run: annotations, whose operators make types."""
    found: set[int] = set()
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.AST):
                found |= {id(part) for part in ast.walk(annotation)}
    return found


def expressions(tree: ast.AST, statement: ast.stmt | None = None) -> Iterator[tuple[ast.expr, ast.stmt]]:
    """Yield each expression with the innermost statement that it is part of."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr) and statement is not None:
            yield node, statement
        yield from expressions(node, node if isinstance(node, ast.stmt) else statement)


def lines_of(statement: ast.stmt) -> tuple[int, int]:
    """Return the first and the last line of a statement, without its body."""
    last = statement.end_lineno or statement.lineno
    body = getattr(statement, "body", [])
    return statement.lineno, max(statement.lineno, body[0].lineno - 1) if body else last


def faults_of(path: Path) -> Iterator[Fault]:
    """Yield all faults of a file, one for each place and variant."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    tree, data = ast.parse(text), text.encode()
    idle = annotations(tree)
    for node, statement in expressions(tree):
        if id(node) in idle:
            continue
        for variant in variants(node):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = f"({ast.unparse(ast.fix_missing_locations(variant))})"
            source = (data[:begin] + after.encode() + data[end:]).decode()
            where = path.relative_to(ROOT).as_posix(), node.lineno, lines_of(statement)
            yield Fault(*where, data[begin:end].decode(), after, source)
