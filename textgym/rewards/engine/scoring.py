"""Runs reward functions on finished completions: weights, components, errors, scaling.

The protocol is the one that TRL's GRPO users write:

    def reward(prompts, completions, *, completion_ids, **columns) -> list[float | None]

sync or async. A function that takes fewer keywords gets fewer. `None` leaves a row out of that function; a list in
place of a float is a token-level reward, one value for each completion token.

A row that no function scores has no score, which is not a score of 0: it is left out of means, groups and training.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from textgym.data.importing import import_attribute
from textgym.errors import ConfigError
from textgym.models.machine.devices import Device, resolve_device
from textgym.rewards.engine.calling import (
    Caller,
    FollowsDevice,
    Log,
    ReadsIds,
    RewardFunction,
    accepted_keywords,
    arguments_for,
)
from textgym.rewards.engine.checking import Value, checked
from textgym.rewards.engine.completions_to_score import Finished, RewardError
from textgym.rewards.engine.failures import RecentFailures
from textgym.rewards.engine.scaling import RunningScale, Scaling
from textgym.rewards.human import HumanRatings
from textgym.rewards.isolated import Isolated
from textgym.rewards.models import RewardModel
from textgym.settings import unmet

__all__ = ["Finished", "OnRewardError", "RewardError", "RewardSpec", "Scorer", "Scores", "load_reward"]

RewardSpec = RewardFunction | str
OnRewardError = Literal["raise", "penalise", "skip"]
PENALTY = 1.0
"""What a failure costs with `on_error="penalise"`, times the function's weight: a value of -1 where that is above 0."""


@dataclass(frozen=True)
class Scores:
    """What reward functions gave.

    Attributes:
        scored: bool `(N,)`, the rows that have a score: at least one function answered, and none failed under
            `on_error="skip"`. A function of weight 0 does not count, unless all are of weight 0.
        raw: `(N,)` float64, the weighted sum over the functions that answered, token-level rewards summed over their
            tokens; NaN where there is no score.
        score: `(N,)` float64, the sum of `rewards`: `raw`, scaled and clipped where that was asked for; 0 where there
            is no score.
        rewards: of each completion token of each row, float64: token-level rewards at their tokens, and the rest of the
            score at the last one.
        components: `(N,)` float64 for each function, unweighted; NaN where the function left the row out.
        errors: `(N,)`, how many functions failed in each row.
        metrics: what functions logged of the whole batch.
        columns: what functions logged of each row.
    """

    scored: np.ndarray
    raw: np.ndarray
    score: np.ndarray
    rewards: list[np.ndarray]
    components: dict[str, np.ndarray]
    errors: np.ndarray
    metrics: dict[str, float]
    columns: dict[str, list[Any]]


class Scorer:
    """A weighted sum of reward functions.

    Args:
        reward: a function, a `"module:attribute"` string, a `RewardModel` or its name, or a list of them.
        weights: one for each function, 1 if not given; a function of weight 0 is only reported.
        tokenizer: the policy's; a reward model that shares it is handed ids instead of text.
        on_error: where a function breaks its contract, `"raise"`, or count it, warn once and go on: `"penalise"` takes
            the function's value for -1 (1 where its weight is negative), `"skip"` leaves the row without a score.
        timeout: seconds that a function has for a batch; async ones run beside each other. With a limit, plain ones
            run in a thread of their own.
        max_failures: with `on_error="penalise"` or `"skip"`, the share of recent rows in which functions may fail.
        scaling: see `RunningScale`.
        clip: see `RunningScale`.
        device: where reward models that are given by name are, and the models of functions that name no device.

    Attributes:
        errors: rows in which each function failed so far.
        trainer_state: what functions are offered as `trainer_state`; agents set it.

    Raises:
        ValueError: no function, another number of weights, or an unknown option.
    """

    def __init__(
        self,
        reward: RewardSpec | Sequence[RewardSpec],
        weights: Sequence[float] | None = None,
        tokenizer: Any = None,
        *,
        on_error: OnRewardError = "raise",
        timeout: float | None = None,
        max_failures: float = 0.1,
        scaling: Scaling | None = None,
        clip: float | None = None,
        device: Device = None,
    ) -> None:
        specs = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
        if not specs:
            raise ValueError("reward is empty: give a reward function, a 'module:attribute' string, or a RewardModel")
        if on_error not in get_args(OnRewardError):
            raise ValueError(f"on_reward_error must be one of {get_args(OnRewardError)}, got {on_error!r}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"reward_timeout must be above 0 seconds, got {timeout}")
        self.functions = [load_reward(spec, device) for spec in specs]
        self.weights = [1.0] * len(specs) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(specs):
            raise ValueError(f"reward_weights has {len(self.weights)} values for {len(specs)} reward functions")
        if (expected := unmet(self.weights, list[float])) is not None:
            raise ConfigError(f"reward_weights must be {expected}, got {self.weights}")
        self.names = _unique_names(self.functions)
        for function in self.functions:
            accepted_keywords(function)  # one without a signature fails here, not after the first episode
            if tokenizer is not None and isinstance(function, ReadsIds):
                function.share_ids_with(tokenizer)
            if device is not None and isinstance(function, FollowsDevice):
                function.follow_device(resolve_device(device))
        self.on_error, self.caller = on_error, Caller(timeout)
        self.failures = RecentFailures(max_failures)
        self.scale = RunningScale(scaling, clip)
        self.errors = dict.fromkeys(self.names, 0)
        self.trainer_state: Any = None

    def __call__(self, finished: Finished) -> Scores:
        """Scores finished completions, one call of every function for all of them.

        Raises:
            RewardError: a function cannot be called with what it is offered; or, with `on_error="raise"`, it raised,
                came too late, or returned the wrong number of values, a NaN, an infinity or a non-number; or too many
                rows failed lately.
        """
        named = list(zip(self.names, self.functions, strict=True))
        logs = [Log(name, len(finished)) for name in self.names]
        arguments = [
            arguments_for(name, function, finished, log, self.trainer_state)
            for (name, function), log in zip(named, logs, strict=True)
        ]
        outcomes = [
            self.caller.start(name, function, given, finished)
            for (name, function), given in zip(named, arguments, strict=True)
        ]
        total, errors = np.zeros(len(finished)), np.zeros(len(finished), dtype=np.int64)
        answered, skipped = np.zeros(len(finished), dtype=bool), np.zeros(len(finished), dtype=bool)
        rewards = [np.zeros(len(ids)) for ids in finished.completion_ids]
        components = {}
        for name, weight, outcome in zip(self.names, self.weights, outcomes, strict=True):
            try:
                values, failed = self._settled(name, weight, checked(name, outcome.wait(), finished))
            except RewardError:
                for other in outcomes:
                    other.cancel()
                raise
            errors += failed
            component = np.array([math.nan if value is None else np.sum(value) for value in values])
            components[name] = component
            if weight != 0 or not any(self.weights):
                answered |= ~np.isnan(component)
                skipped |= failed & (self.on_error == "skip")
            total += weight * np.nan_to_num(component)
            for row, value in enumerate(values):
                if isinstance(value, np.ndarray):
                    rewards[row] += weight * value
                elif value is not None:
                    rewards[row][-1:] += weight * value  # a slice, since a completion may be empty
        if self.on_error != "raise":
            self.failures.count(errors > 0, self.errors)
        scored = answered & ~skipped
        score, factors = np.zeros_like(total), np.zeros_like(total)
        score[scored], factors[scored] = self.scale(total[scored])
        for row, factor in enumerate(factors):
            rewards[row] *= factor
            rewards[row][-1:] -= factor * self.scale.shift
        return Scores(
            scored,
            np.where(scored, total, np.nan),
            score,
            rewards,
            components,
            errors,
            {name: float(np.mean(values)) for log in logs for name, values in log.metrics.items()},
            {name: values for log in logs for name, values in log.columns.items()},
        )

    def close(self) -> None:
        """End the threads and processes of reward functions; a later call starts new ones."""
        self.caller.close()
        for function in self.functions:
            if isinstance(function, Isolated | HumanRatings):
                function.close()

    def state(self) -> dict[str, Any]:
        """What an agent saves: the running mean and deviation, and the counters; plain values."""
        return {"scale": asdict(self.scale), "errors": dict(self.errors)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        for name in ("count", "mean", "squares"):  # how to scale is this scorer's own
            setattr(self.scale, name, state["scale"][name])
        self.errors.update(state["errors"])

    def _settled(self, name: str, weight: float, values: list[Value | RewardError]) -> tuple[list[Value], np.ndarray]:
        """Return values with what stands in for failed rows, and which rows failed, bool `(N,)`; count those.

        Raises:
            RewardError: the first failure, if failures are not to be lived with.
        """
        failed = np.array([isinstance(value, RewardError) for value in values])
        if failed.any():
            first = values[int(failed.argmax())]
            if self.on_error == "raise":
                raise first  # type: ignore[misc]  # it is an error
            if not self.errors[name]:
                warnings.warn(f"{first} (on_reward_error={self.on_error!r}; said once, then counted)", stacklevel=2)
            self.errors[name] += int(failed.sum())
        instead = -math.copysign(PENALTY, weight) if self.on_error == "penalise" else None
        return [instead if isinstance(value, RewardError) else value for value in values], failed


def load_reward(spec: RewardSpec, device: Device = None) -> RewardFunction:
    """A reward function from a callable, a `"module:attribute"` string, or a reward model's name or path.

    A class stands for its instance without arguments: `"textgym.rewards.functions:Rouge"`.
    """
    if isinstance(spec, str):
        spec = import_attribute(spec) if ":" in spec else RewardModel.from_pretrained(spec, device=device)
    if not callable(spec):
        raise ValueError(f"a reward is a function, a 'module:attribute' string or a reward model, got {spec!r}")
    return spec() if isinstance(spec, type) else spec


def _unique_names(functions: list[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        base = getattr(function, "__name__", type(function).__name__)
        candidates = itertools.chain([base], (f"{base}_{copy}" for copy in itertools.count(2)))
        names.append(next(name for name in candidates if name not in names))
    return names
