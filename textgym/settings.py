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
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from textgym.errors import ConfigError


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


def between(low: float, high: float) -> Check:
    """Values from `low` to `high`, both allowed."""
    return Check(f"from {low} to {high}", lambda value: low <= value <= high)


Count = Annotated[int, at_least(1)]
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]
Share = Annotated[float, between(0, 1)]
PositiveShare = Annotated[Share, above(0)]


def check_settings(config: Any) -> None:
    """Check the type and range of every field of a config.

    Numbers must be finite. Fields of other types than numbers, flags, strings and literals are not checked here.

    Raises:
        ConfigError: a field has a value that its annotation does not allow.
    """
    config_class: type = type(config)
    annotations = _annotations(config_class)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        expected = unmet(value, annotations[field.name])
        if expected is not None:
            default = "" if field.default is dataclasses.MISSING else f"; the default is {field.default!r}"
            raise ConfigError(f"{field.name} must be {expected}, got {value!r}{default}")


def unmet(value: Any, annotation: Any) -> str | None:
    """What an annotation asks for, if a value does not meet it, else `None`.

    >>> unmet(2.0, Share), unmet(None, Count | None), unmet("k4", Literal["k1", "k2"])
    ('from 0 to 1', None, "'k1' or 'k2'")
    """
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        plain, *checks = members
        return unmet(value, plain) or next((check.words for check in checks if not check.holds(value)), None)
    if origin in (Union, UnionType):
        expected = [unmet(value, member) for member in members]
        return None if None in expected else " or ".join(map(str, expected))
    if origin is Literal:
        return None if value in members else " or ".join(map(repr, members))
    return None if annotation not in _TYPES or _TYPES[annotation].holds(value) else _TYPES[annotation].words


def _is_number(value: Any, kind: type) -> bool:
    # A bool is an int to Python, but True is no learning rate.
    return isinstance(value, kind) and not isinstance(value, bool)


_TYPES: dict[Any, Check] = {
    bool: Check("True or False", lambda value: isinstance(value, bool | np.bool_)),
    int: Check("a whole number", lambda value: _is_number(value, Integral)),
    float: Check("a finite number", lambda value: _is_number(value, Real) and math.isfinite(value)),
    str: Check("a string", lambda value: isinstance(value, str)),
    NoneType: Check("None", lambda value: value is None),
}


@lru_cache
def _annotations(config_class: type) -> dict[str, Any]:
    """Annotations as objects; modules that postpone them have strings."""
    return get_type_hints(config_class, include_extras=True)
