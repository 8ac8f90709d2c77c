"""Check the fields of a config against their annotations, when the config is made.

A config is a dataclass whose annotations say which values a field may have, and whose `__post_init__` calls
`check_settings`:

    @dataclass
    class Config:
        gamma: Share = 1.0
        minibatch_size: Count | None = 32
        variant: Literal["clip", "penalty"] = "clip"

        def __post_init__(self) -> None:
            check_settings(self)
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import os
import warnings
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from textgym.errors import ConfigError, ExcludedOptionError
from textgym.option_pairs import refuse_pairs

P = ParamSpec("P")
Result = TypeVar("Result")
Config = TypeVar("Config")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Check:
    """Stands in `Annotated`.

    Attributes:
        words: what a value must be, such as "above 0".
        holds: whether a value is.
    """

    words: str
    holds: Callable[[Any], bool]


def above(low: float) -> Check:
    """Values greater than `low`."""
    return Check(f"above {low}", lambda value: value > low)


def at_least(low: float) -> Check:
    """Values that are `low` or greater."""
    return Check(f"at least {low}", lambda value: value >= low)


def at_most(high: float) -> Check:
    """Values that are `high` or less."""
    return Check(f"at most {high}", lambda value: value <= high)


def between(low: float, high: float) -> Check:
    """Values from `low` to `high`, both allowed."""
    return Check(f"from {low} to {high}", lambda value: low <= value <= high)


MOST = 2**31 - 1
Count = Annotated[int, at_least(1), at_most(MOST)]
WholeNumber = Annotated[int, at_least(0), at_most(MOST)]
Seed = Annotated[int, between(0, 2**32 - 1)]
"""What NumPy's and torch's generators can all be seeded with."""
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]
Share = Annotated[float, between(0, 1)]
PositiveShare = Annotated[Share, above(0)]
Reader = Literal["sft", "dpo", "reward-model"]
"""What reads a data set."""
Estimator = Literal["k1", "k2", "k3", "full"]
"""How the KL is estimated, see `textgym.rewards.kl.estimate_kl`."""
OnNonFinite = Literal["raise", "skip"]
"""What happens to an optimiser step whose numbers are NaN or infinite, see `textgym.models.machine.finite`."""


def check_settings(config: Any) -> None:
    """Check the type and range of every field of a config, and which fields may be set together.

    Numbers must be finite; scalars of numpy and torch become plain numbers.

    Raises:
        ConfigError: a field has a value that its annotation does not allow, or is set beside one that excludes it; see
            `textgym.option_pairs`.
    """
    config_class: type = type(config)
    annotations = _annotations(config_class)
    for field in dataclasses.fields(config):
        value = plain(getattr(config, field.name))
        expected = unmet(value, annotations[field.name])
        if expected is not None:
            default = "" if field.default is dataclasses.MISSING else f"; the default is {field.default!r}"
            raise ConfigError(f"{field.name} must be {expected}, got {value!r}{default}")
        object.__setattr__(config, field.name, value)  # configs may be frozen
    refuse_pairs(config)


def check_arguments(function: Callable[P, Result]) -> Callable[P, Result]:
    """Check the arguments of every call of a function, or of an `__init__`, as `check_settings` checks fields."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        annotations = _annotations(function)
        for name, value in bound.arguments.items():
            if name not in annotations or signature.parameters[name].kind in _VARIADIC:
                continue
            bound.arguments[name] = plain(value)
            expected = unmet(bound.arguments[name], annotations[name])
            if expected is not None:
                raise ConfigError(f"{name} must be {expected}, got {value!r}")
        return function(*bound.args, **bound.kwargs)

    return with_checks


def from_plain(config_class: type[Config], values: Any, where: str) -> Config:
    """Make a dataclass from what a file says, which is checked first: nothing in a file becomes an argument unseen.

    Args:
        config_class: The dataclass; it lists the fields that are known.
        values: What the file has, a mapping.
        where: The file, for errors.

    Raises:
        ConfigError: a field is unknown or missing, or has a value that its annotation does not allow.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of names to values, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where} has an unknown field {name!r}: {nearest(name, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where} has no field {name!r}")
    try:
        config = config_class(**values)
        check_settings(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def idle_options(config_class: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Return the options in a file that have no effect beside the others, and why; earlier versions accepted them.

    Args:
        config_class: The dataclass.
        values: What the file has, by name.
    """
    idle: dict[str, str] = {}
    while True:
        try:
            from_plain(config_class, {name: values[name] for name in values if name not in idle}, "")
        except ConfigError as error:
            refused = error.__cause__
            if isinstance(refused, ExcludedOptionError) and refused.idle:
                idle[refused.option] = str(refused)
                continue
        return idle


def without_idle(config_class: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a file has without options that have no effect, with a warning for each of them.

    Args:
        config_class: The dataclass.
        values: What the file has, by name.
        where: The file, for warnings.
    """
    idle = idle_options(config_class, values)
    for reason in idle.values():
        warnings.warn(f"{where}: {reason}. It had no effect, and is left out", stacklevel=3)
    return {name: value for name, value in values.items() if name not in idle}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is meant, as a question, or the list of all."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as a plain number, and anything else as it is."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    if is_scalar or (type(value).__module__ == "torch" and type(value).__name__ == "Tensor" and value.ndim == 0):
        return value.item()
    return value


def unmet(value: Any, annotation: Any) -> str | None:
    """What an annotation asks for, if a value does not meet it, else `None`.

    >>> unmet(2.0, Share), unmet(None, Count | None), unmet("k4", Literal["k1", "k2"])
    ('from 0 to 1', None, "'k1' or 'k2'")
    >>> unmet([1.0, float("nan")], list[float])
    'a sequence, each a finite number'
    """
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bare, *checks = (member for member in members if member is members[0] or isinstance(member, Check))
        return unmet(value, bare) or next((check.words for check in checks if not check.holds(value)), None)
    if origin in (Union, UnionType):
        expected = [unmet(value, member) for member in members]
        return None if None in expected else " or ".join(map(str, expected))
    if origin is Literal:
        # `in` would take True for 1, and unhashable values are no choice either.
        return None if any(type(value) is type(m) and value == m for m in members) else " or ".join(map(repr, members))
    if origin in (list, tuple, abc.Sequence):
        return _unmet_by_entries(value, members)
    if origin in (dict, abc.Mapping):
        return None if isinstance(value, abc.Mapping) else "a mapping"
    if origin is abc.Callable:
        return None if callable(value) else "a function"
    if annotation in _TYPES:
        return None if _TYPES[annotation].holds(value) else _TYPES[annotation].words
    if getattr(annotation, "_is_protocol", False):
        return _unmet_protocol(value, annotation)
    if isinstance(annotation, type) and annotation is not Any:
        return None if isinstance(value, annotation) else f"a {annotation.__name__}"
    return None


def _unmet_by_entries(value: Any, members: tuple[Any, ...]) -> str | None:
    """What a sequence should be; JSON has lists only, so a list stands for a tuple as well."""
    value = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if not isinstance(value, abc.Sequence) or isinstance(value, str | bytes):
        return "a sequence"
    if len(members) > 1 and members[1] is not Ellipsis:  # a tuple of so many
        if len(value) != len(members):
            return f"{len(members)} values"
        pairs = list(zip(value, members, strict=True))
    else:
        pairs = [(entry, members[0]) for entry in value] if members else []
    expected = [words for entry, member in pairs if (words := unmet(plain(entry), member)) is not None]
    return f"a sequence, each {expected[0]}" if expected else None


def _unmet_protocol(value: Any, protocol: type) -> str | None:
    """What an object should be that lacks attributes or methods of a protocol."""
    members = [name for name in {**inspect.get_annotations(protocol), **vars(protocol)} if not name.startswith("_")]
    if not isinstance(value, Real | str | bytes | NoneType) and all(hasattr(value, name) for name in members):
        return None
    return f"a {protocol.__name__}" + (f", with {' and '.join(members)}" if members else "")


def _is_number(value: Any, kind: type) -> bool:
    # A bool is an int to Python, but True is no learning rate.
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


_TYPES: dict[Any, Check] = {
    bool: Check("True or False", lambda value: isinstance(value, bool)),
    int: Check("a whole number", lambda value: _is_number(value, Integral)),
    float: Check("a finite number", lambda value: _is_number(value, Real) and _is_finite(value)),
    str: Check("a string", lambda value: isinstance(value, str)),
    Path: Check("a path", lambda value: isinstance(value, str | os.PathLike)),
    NoneType: Check("None", lambda value: value is None),
}


@lru_cache
def _annotations(annotated: Any) -> dict[str, Any]:
    """Annotations of a class or function as objects; modules that postpone them have strings."""
    return get_type_hints(annotated, include_extras=True)
