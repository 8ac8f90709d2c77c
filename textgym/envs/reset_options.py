"""The options of `reset`: which prompts, and which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def check_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> None:
    """Refuse options that the environment would ignore.

    Raises:
        ValueError: if there is one, or the options are not a dict.
    """
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise ValueError(f"reset takes options as a dict, such as {{'prompt_index': 0}}, got {options!r}")
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"reset has no option {unknown[0]!r}: it takes {' and '.join(map(repr, known))}")


def prompt_choice(options: Mapping[str, Any] | None, count: int, num_prompts: int) -> np.ndarray | None:
    """Return `options["prompt_index"]` as indices `(count,)`, or `None` if the options choose no prompts."""
    if options is None or "prompt_index" not in options:
        return None
    given = options["prompt_index"]
    chosen = np.asarray(given.cpu() if isinstance(given, Tensor) else given).reshape(-1)
    whole = np.issubdtype(chosen.dtype, np.integer)
    if not whole or len(chosen) != count or (chosen < 0).any() or (chosen >= num_prompts).any():
        raise ValueError(
            f"options['prompt_index'] must hold {count} whole numbers from 0 to {num_prompts - 1}, got {given!r}"
        )
    return chosen.astype(np.int64)


def chosen_rows(options: Mapping[str, Any] | None, num_envs: int) -> np.ndarray:
    """Return the rows to reset, bool `(num_envs,)`: those of `options["reset_mask"]`, or all."""
    if options is None or "reset_mask" not in options:
        return np.ones(num_envs, dtype=bool)
    given = options["reset_mask"]
    mask = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if mask.shape != (num_envs,) or mask.dtype != bool or not mask.any():
        raise ValueError(
            f"options['reset_mask'] must be a bool array of shape ({num_envs},) with a True in it, got {given}"
        )
    return mask
