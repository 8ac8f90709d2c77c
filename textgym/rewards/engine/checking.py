"""Checks what reward functions return: one finite number a row, one a token, or `None`."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from textgym.rewards.engine.completions_to_score import Finished, RewardError

LARGEST = float(np.finfo(np.float32).max)
"""Rewards are float32 to agents, where larger ones are infinite."""
Value = float | np.ndarray | None
"""A row's score, its token-level rewards, or nothing."""


def checked(name: str, values: Any, finished: Finished) -> list[Value | RewardError]:
    """What a function returned, row by row; a `RewardError` in the rows where it broke the contract.

    Args:
        name: of the function, for errors.
        values: a list, array or tensor of any device; a `RewardError` stands for all rows.
        finished: the rows that were scored.
    """
    if isinstance(values, RewardError):
        return [values] * len(finished)
    problem = None
    try:
        values = _listed(values)
    except Exception as error:  # such as a tensor on the meta device, which holds no numbers
        problem = f"returned a {type(values).__name__} that cannot be read ({error})"
    if problem is None and (not isinstance(values, list | tuple) or len(values) != len(finished)):
        got = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
        problem = f"must return a list of {len(finished)} values, one for each completion; got {got}"
    if problem is not None:
        return [RewardError(f"reward function {name!r} {problem}, the first row being {finished.row(0)}")] * len(
            finished
        )
    return [_checked_value(name, value, finished, row) for row, value in enumerate(values)]


def _checked_value(name: str, value: Any, finished: Finished, row: int) -> Value | RewardError:
    """A row's value: booleans count as 0 and 1, a list is a token-level reward."""
    try:
        value = _listed(value)
        if value is None:
            return None
        entries = [_listed(entry) for entry in value] if isinstance(value, list | tuple) else [value]
    except Exception as error:
        problem = f"returned a {type(value).__name__} that cannot be read ({error})"
        return RewardError(f"reward function {name!r} {problem} for {finished.row(row)}")
    by_token = isinstance(value, list | tuple)
    if by_token and len(entries) != len(finished.completion_ids[row]):  # whatever stands in the padding
        return RewardError(
            f"reward function {name!r} returned {len(entries)} token-level rewards for the "
            f"{len(finished.completion_ids[row])} completion tokens of {finished.row(row)}: give one for each of its "
            "completion_ids, and none for padding"
        )
    for entry in entries:
        if (reason := _unpayable(entry)) is not None:
            return RewardError(f"reward function {name!r} returned {entry!r}, {reason}, for {finished.row(row)}")
    return np.asarray(entries, dtype=np.float64) if by_token else float(value)


def _unpayable(entry: Any) -> str | None:
    """What is wrong with a value, `None` if nothing is."""
    try:
        if not isinstance(entry, Real) or not math.isfinite(entry):
            return "not a finite number"
    except OverflowError:  # an integer beyond all floats
        return "not a finite number"
    return None if abs(float(entry)) <= LARGEST else "beyond the largest number of float32, in which rewards are paid"


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor of any device
