"""The help of the `textgym` command: what each command does, and its options under headings, with their defaults.

tyro puts options under one heading unless their names begin with it, so this is printed from the dataclasses instead.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

RESUME = "Continues a run that was stopped, or makes a finished one longer: `textgym resume runs/x`."
FURTHER = "`textgym COMMAND --help` lists the options of a command, `textgym train --agent NAME --help` an agent's."


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for the help of its command."""
    return "--help" in words or "-h" in words


def print_commands(commands: Mapping[str, type]) -> None:
    """Print what each command does."""
    table = Table.grid(padding=(0, 2))
    for name, kind in commands.items():
        table.add_row(Text(f"  {name}", "bold"), RESUME if name == "resume" else inspect.getdoc(kind))
    Console().print(
        "usage: textgym COMMAND [OPTIONS]\n",
        table,
        f"\n{FURTHER}",
        highlight=False,
        markup=False,
    )


def print_command(name: str, command: type, sections: Mapping[str, Sequence[str]]) -> None:
    """Print what a command does, and its options: name, values, meaning and default.

    Args:
        name: The command.
        command: Its dataclass; a field that is itself a dataclass adds its own fields, under a heading for each class
            that declares some.
        sections: Headings, and the fields of the command under them.
    """
    options = list(_options(command, None, sections))
    needed = [option.words for option in options if option.positional or option.required]
    if name == "resume":
        needed = ["RUN"]
    usage = " ".join(["usage: textgym", name, *needed, "[OPTIONS]"])
    shown: list[Any] = [f"{usage}\n", RESUME if name == "resume" else inspect.getdoc(command)]
    width = max(36, *(2 + len(line) for option in options for line in option.flag.splitlines()))
    for heading in dict.fromkeys(option.heading for option in options):
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=width, overflow="fold")
        for option in options:
            if option.heading == heading:
                table.add_row(Text(textwrap.indent(option.words, "  "), "bold"), option.help)
        shown += [Text(f"\n{heading}", "underline"), table]
    Console().print(Group(*shown), highlight=False, markup=False)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        heading: Heading that it stands under.
        flag: Its flag, such as `--learning-rate`.
        values: What may follow it, such as `FLOAT`.
        help: Its meaning and default.
        required: Whether it must be given.
        positional: Whether its value stands without a flag.
    """

    heading: str
    flag: str
    values: str
    help: str
    required: bool
    positional: bool

    @property
    def words(self) -> str:
        """How it stands on a command line."""
        return f"{self.flag} {self.values}".rstrip()


def _options(command: type, default: Any, sections: Mapping[str, Sequence[str]], prefix: str = "") -> Iterator[Option]:
    """Yield the options of a dataclass; those of nested dataclasses come last.

    Args:
        command: The dataclass.
        default: An instance with the defaults; `None` for those of the fields.
        sections: Headings of fields; of those without one it is "options", in nested dataclasses their class.
        prefix: What the flags of a nested dataclass begin with.
    """
    annotations = get_type_hints(command, include_extras=True)
    headings = {name: heading for heading, names in sections.items() for name in names}
    fields = {field.name: field for field in dataclasses.fields(command)}
    rest = "other options" if sections else "options"
    nested = []
    homes = {name: _home(command, name) for name in fields}
    own_first = sorted(fields, key=lambda name: command.__mro__.index(homes[name]))
    for name in dict.fromkeys([*headings, *own_first]):
        value = _default(fields[name]) if default is None else getattr(default, name)
        if dataclasses.is_dataclass(value):
            nested.append((name, value))
            continue
        heading = _title(homes[name]) if default is not None else headings.get(name, rest)
        positional = tyro.conf.Positional in get_args(annotations[name])
        required = value is dataclasses.MISSING
        flag, values = (name.upper(), "") if positional else _flag(prefix, name, annotations[name])
        ending = "(required)" if required else f"(default: {_shown(value)})"
        yield Option(heading, flag, values, f"{_meanings(homes[name])[name]} {ending}", required, positional)
    for name, value in nested:
        bare = tyro.conf.OmitArgPrefixes in get_args(annotations[name])
        yield from _options(type(value), value, {}, prefix if bare else f"{prefix}{name}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _flag(prefix: str, name: str, annotation: Any) -> tuple[str, str]:
    """Return the flag of a field, and what may follow it."""
    prefix, name = f"--{prefix}".replace("_", "-"), name.replace("_", "-")
    if annotation is bool:
        return f"{prefix}{name},\n{prefix}no-{name}", ""
    return f"{prefix}{name}", _values(annotation)


def _values(annotation: Any) -> str:
    """Return what may follow a flag, such as `INT`, `{clip,penalty}` or `None|FLOAT`."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(members[0])
    if origin in (Union, UnionType):
        return "|".join(_values(member) for member in members)
    if origin is Literal:
        return "{" + ", ".join(map(str, members)) + "}"
    if origin is dict:
        return f"[{_values(members[0])} {_values(members[1])} ...]"
    if origin is tuple and members[-1] is Ellipsis:
        return f"[{_values(members[0])} ...]"
    if origin is tuple:
        return " ".join(map(_values, members))
    return "None" if annotation is NoneType else str(annotation.__name__).upper()


def _shown(value: Any) -> str:
    if isinstance(value, tuple | dict):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _home(command: type, name: str) -> type:
    """Return the class that declares a field."""
    return next(kind for kind in command.__mro__ if name in inspect.get_annotations(kind))


def _title(config: type) -> str:
    """Return the heading of a config's options: "Hyperparameters of PPO. More" gives "PPO"."""
    sentence = (inspect.getdoc(config) or "").split(". ")[0].splitlines()[0]
    return sentence.removeprefix("Hyperparameters of ").rstrip(".")


@functools.lru_cache
def _meanings(config: type) -> dict[str, str]:
    """Return the strings under the fields of a class."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
