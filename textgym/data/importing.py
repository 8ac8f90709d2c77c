"""Import objects by name, so that configurations can be plain JSON."""

from __future__ import annotations

import importlib
import re
from typing import Any


def import_attribute(name: str) -> Any:
    """Import the object `"module:attribute"`; the attribute may contain dots.

    >>> import_attribute("math:pi")
    3.141592653589793

    Raises:
        ValueError: If the name has another form, or the module or the attribute does not exist.
    """
    if not re.fullmatch(r"[\w.\-]+:[\w.]+", name):
        raise ValueError(
            f"{name!r} does not name an object: write 'module:attribute', such as 'my_package.rewards:brevity'"
        )
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports does not
        raise ValueError(
            f"{name!r}: there is no module {error.name!r}. Install it, or add the folder it is in to PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name!r}: {module_name!r} has no {path!r}. It has: {', '.join(_public_names(found))}")
        found = getattr(found, part)
    return found


def _public_names(found: Any) -> list[str]:
    return [name for name in dir(found) if not name.startswith("_")]
