"""Runs reward functions on finished completions: keywords, validation, weights, components.

The protocol is the one that TRL's GRPO users write:

    def reward(prompts, completions, *, completion_ids, **columns) -> list[float | None]

sync or async. A function that takes fewer keywords gets fewer. `None` leaves a row out of that function; a list in
place of a float is a token-level reward, one value for each completion token.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from textgym.data.importing import import_attribute
from textgym.rewards.model import RewardModel

RewardFunction = Callable[..., Any]
RewardSpec = RewardFunction | str


class RewardError(ValueError):
    """A reward function broke its contract; the message names the function, the row and its text."""


@dataclass(frozen=True)
class Finished:
    """Completions to score, N rows.

    Attributes:
        prompts: the prompts as text.
        completions: the responses as text, without the stop token.
        prompt_ids: the prompts as the policy saw them.
        completion_ids: the tokens as they were sampled, stop token included.
        columns: further columns of the prompts' rows, each a list of N values.
    """

    prompts: list[str]
    completions: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Scores:
    """What reward functions gave.

    Attributes:
        score: `(N,)` float64, the weighted sum over the functions, token-level rewards summed over their tokens.
        token_rewards: the weighted token-level rewards of each row, or `None` if no function gave any.
        components: `(N,)` float64 for each function, unweighted; NaN where the function left the row out.
    """

    score: np.ndarray
    token_rewards: list[np.ndarray] | None
    components: dict[str, np.ndarray]


class Scorer:
    """A weighted sum of reward functions.

    Args:
        reward: a function, a `"module:attribute"` string, a `RewardModel` or its name, or a list of them.
        weights: one for each function, 1 if not given; a function of weight 0 is only reported.
        tokenizer: the policy's; a reward model that shares it is handed ids instead of text.

    Raises:
        ValueError: no function, or another number of weights.
    """

    def __init__(
        self, reward: RewardSpec | Sequence[RewardSpec], weights: Sequence[float] | None = None, tokenizer: Any = None
    ) -> None:
        specs = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
        if not specs:
            raise ValueError("reward is empty: give a reward function, a 'module:attribute' string, or a RewardModel")
        self.functions = [load_reward(spec) for spec in specs]
        self.weights = [1.0] * len(specs) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(specs):
            raise ValueError(f"reward_weights has {len(self.weights)} values for {len(specs)} reward functions")
        self.names = _unique_names(self.functions)
        self.keywords = [_accepted_keywords(function) for function in self.functions]
        for function in self.functions:
            if isinstance(function, RewardModel) and tokenizer is not None:
                function.share_ids_with(tokenizer)

    def __call__(self, finished: Finished) -> Scores:
        """Scores finished completions, one call of every function for all of them.

        Raises:
            RewardError: a function raised, or returned the wrong number of values, a NaN, an infinity or a non-number.
        """
        score = np.zeros(len(finished))
        token_rewards = [np.zeros(len(ids)) for ids in finished.completion_ids]
        any_token_level, components = False, {}
        for name, function, keywords, weight in zip(
            self.names, self.functions, self.keywords, self.weights, strict=True
        ):
            values = _validated(name, _call(name, function, keywords, finished), finished)
            components[name] = np.array([math.nan if value is None else np.sum(value) for value in values])
            score += weight * np.nan_to_num(components[name])
            for row, value in enumerate(values):
                if isinstance(value, np.ndarray):
                    any_token_level = True
                    token_rewards[row] += weight * value
        return Scores(score, token_rewards if any_token_level else None, components)


def load_reward(spec: RewardSpec) -> RewardFunction:
    """A reward function from a callable, a `"module:attribute"` string, or a reward model's name or path."""
    if callable(spec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"a reward is a function, a 'module:attribute' string or a reward model, got {spec!r}")
    return import_attribute(spec) if ":" in spec else RewardModel.from_pretrained(spec)


def _unique_names(functions: list[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        base = getattr(function, "__name__", type(function).__name__)
        candidates = itertools.chain([base], (f"{base}_{copy}" for copy in itertools.count(2)))
        names.append(next(name for name in candidates if name not in names))
    return names


def _accepted_keywords(function: RewardFunction) -> set[str] | None:
    """Names of the keywords a function takes, or `None` if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}


def _call(name: str, function: RewardFunction, keywords: set[str] | None, finished: Finished) -> Any:
    offered = {
        **finished.columns,
        "prompts": finished.prompts,
        "completions": finished.completions,
        "prompt_ids": finished.prompt_ids,
        "completion_ids": finished.completion_ids,
    }
    arguments = {key: offered[key] for key in offered if keywords is None or key in keywords}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise RewardError(
            f"reward function {name!r} cannot be called: {error}. It is offered {', '.join(offered)}; "
            "anything else must be a column of the prompts"
        ) from error
    try:
        result = function(**arguments)
        return _waited_for(result) if inspect.isawaitable(result) else result
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__}: {error} while scoring {len(finished)} rows, "
            f"the first being {_row(finished, 0)}"
        ) from error


def _waited_for(result: Awaitable[Any]) -> Any:
    """What an async function comes to, in a thread of its own: notebooks have a loop running in the main one."""

    async def awaited() -> Any:
        return await result

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, awaited()).result()


def _validated(name: str, values: Any, finished: Finished) -> list[float | np.ndarray | None]:
    values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor of any device
    if not isinstance(values, list | tuple) or len(values) != len(finished):
        got = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
        raise RewardError(
            f"reward function {name!r} must return a list of {len(finished)} values, one for each completion, "
            f"the first being {_row(finished, 0)}; got {got}"
        )
    return [_validated_value(name, value, finished, row) for row, value in enumerate(values)]


def _validated_value(name: str, value: Any, finished: Finished, row: int) -> float | np.ndarray | None:
    """A row's value: booleans count as 0 and 1, a list is a token-level reward."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return None
    entries = value if isinstance(value, list | tuple) else [value]
    for entry in entries:
        if not isinstance(entry, Real) or not math.isfinite(entry):
            where = _row(finished, row)
            raise RewardError(f"reward function {name!r} returned {entry!r}, not a finite number, for {where}")
    if entries is not value:
        return float(value)
    if len(value) != len(finished.completion_ids[row]):
        raise RewardError(
            f"reward function {name!r} returned {len(value)} token-level rewards for the "
            f"{len(finished.completion_ids[row])} completion tokens of {_row(finished, row)}"
        )
    return np.asarray(value, dtype=np.float64)


def _row(finished: Finished, row: int) -> str:
    return f"row {row} (prompt {finished.prompts[row]!r}, completion {finished.completions[row]!r})"
