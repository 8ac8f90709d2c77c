"""Calls reward functions: the keywords each takes, async ones beside each other, exceptions and late answers."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch

from textgym.rewards.engine.completions_to_score import Finished, RewardError

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class PendingCall:
    """A call of a reward function, under way or over.

    Attributes:
        wait: waits for what it returned, or for the `RewardError` it came to.
        cancel: calls it off; nothing happens if it is over.
    """

    wait: Callable[[], Any]
    cancel: Callable[[], Any] = lambda: None


@runtime_checkable
class ReadsIds(Protocol):
    """A reward function that reads the policy's token ids where it may, such as a reward model."""

    def share_ids_with(self, tokenizer: Any) -> bool:
        """Hears of the policy's tokenizer; answers whether ids will be read."""


@runtime_checkable
class FollowsDevice(Protocol):
    """A reward function with a model that was named without a device, which is then the environment's."""

    def follow_device(self, device: torch.device) -> None:
        """Hears from an environment where it is, and goes there unless the caller has chosen a device."""


class Log:
    """What a reward function logs in one call, through the keywords `log_metric` and `log_extra`.

    Args:
        name: of the function, for errors.
        num_rows: how many values a column has.

    Attributes:
        metrics: the values of each name.
        columns: a value for each row, of each name.
    """

    def __init__(self, name: str, num_rows: int) -> None:
        self.name, self.num_rows = name, num_rows
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """A number that describes the whole batch."""
        self.metrics[name].append(float(value))

    def extra(self, column: str, values: list[Any]) -> None:
        """A column for the table of completions.

        Raises:
            RewardError: another number of values than there are completions.
        """
        if len(values) != self.num_rows:
            raise RewardError(
                f"reward function {self.name!r} gave log_extra({column!r}) {len(values)} values for {self.num_rows} "
                "completions"
            )
        self.columns[column] = list(values)


def accepted_keywords(function: RewardFunction) -> tuple[frozenset[str], bool]:
    """Names of the keywords a function takes, and whether it takes any other besides."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(named), any(p.kind is p.VAR_KEYWORD for p in parameters)


def arguments_for(name: str, function: RewardFunction, finished: Finished, log: Log, state: Any) -> dict[str, Any]:
    """The keywords that a function takes, of all it is offered.

    Lists are copies, down to what is in them: what a function changes, neither another one nor the next epoch sees.

    Raises:
        RewardError: it demands one that is not there.
    """
    texts = {**finished.columns, "prompts": finished.prompts, "completions": finished.completions}
    ids = {"prompt_ids": finished.prompt_ids, "completion_ids": finished.completion_ids}
    others = {"log_extra": log.extra, "log_metric": log.metric, "trainer_state": state}
    offered = {**texts, **ids, **others}
    named, any_other = accepted_keywords(function)
    wanted = offered.keys() if any_other else offered.keys() & named
    if "text_ids" in named:  # only if it is asked for: TRL has no such list
        ids["text_ids"] = finished.completion_ids if finished.text_ids is None else finished.text_ids
        wanted = wanted | {"text_ids"}
    if "completions_ids" in named:  # the name in the examples of TRL's documentation
        ids["completions_ids"] = finished.completion_ids
        wanted = wanted | {"completions_ids"}
    arguments = {
        **{name: copy.deepcopy(values) for name, values in texts.items() if name in wanted},
        **{name: [list(row) for row in rows] for name, rows in ids.items() if name in wanted},
        **{name: value for name, value in others.items() if name in wanted},
    }
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise RewardError(
            f"reward function {name!r} cannot be called: {error}. It is offered {', '.join(offered)}; "
            "anything else must be a column of the prompts"
        ) from error
    return arguments


def start(
    name: str, function: RewardFunction, arguments: dict[str, Any], finished: Finished, timeout: float | None
) -> PendingCall:
    """Calls a function. An async one is under way in the background until its outcome is asked for.

    Args:
        name: of the function, for errors.
        function: whom to call.
        arguments: what with.
        finished: the rows, for errors.
        timeout: seconds that an async function has; a plain one cannot be stopped.
    """
    try:
        result = function(**arguments)
        if not inspect.isawaitable(result):
            return PendingCall(lambda: result)
    except Exception as error:
        failure = _failed(name, error, finished)
        return PendingCall(lambda: failure)
    loop = _background_loop(os.getpid())
    answer = asyncio.run_coroutine_threadsafe(_in_time(name, result, timeout), loop)

    def waited_for() -> Any:
        try:
            return answer.result(None if timeout is None else timeout + GRACE)
        except (_TooLate, TimeoutError) as error:
            if isinstance(error, TimeoutError) and answer.done():
                return _failed(name, error, finished)  # the function's own
            answer.cancel()
            late = f"reward function {name!r} did not answer within {timeout:g} s for {len(finished)} rows"
            if isinstance(error, TimeoutError):  # it did not even hear that its time is up
                late += f", since {_give_up(loop)!r} blocks the event loop of all async functions (use await in it)"
            return RewardError(f"{late}, the first being {finished.row(0)}: raise reward_timeout?")
        except Exception as error:
            return _failed(name, error, finished)

    return PendingCall(waited_for, answer.cancel)


GRACE = 1.0
"""Seconds beyond its timeout after which an async function that blocks the loop is given up."""


class _TooLate(Exception):
    """The time of an async function is up."""


async def _in_time(name: str, result: Awaitable[Any], timeout: float | None) -> Any:
    task = asyncio.current_task()
    assert task is not None  # this is one
    task.set_name(name)
    try:
        async with asyncio.timeout(timeout) as limit:
            return await result
    except TimeoutError as error:
        if limit.expired():
            raise _TooLate from error
        raise  # the function's own
    except (SystemExit, KeyboardInterrupt) as error:  # it would end the loop that others wait in
        raise RuntimeError(f"{type(error).__name__} in an async reward function") from error


@lru_cache(maxsize=1)
def _background_loop(process: int) -> asyncio.AbstractEventLoop:
    """One event loop in a thread of its own: notebooks have one running in theirs, and clients outlive a call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="textgym-rewards", daemon=True).start()
    return loop


def _give_up(loop: asyncio.AbstractEventLoop) -> str:
    """Let later calls have a fresh loop; return the name of the function that blocks this one."""
    task = asyncio.current_task(loop)
    if _background_loop(os.getpid()) is loop:
        _background_loop.cache_clear()
    loop.call_soon_threadsafe(loop.stop)  # when what blocks it is over
    return task.get_name() if task is not None else "something"


def _failed(name: str, cause: Exception, finished: Finished) -> RewardError:
    error = cause
    if not isinstance(error, RewardError):
        error = RewardError(
            f"reward function {name!r} raised {type(cause).__name__}: {cause} while scoring {len(finished)} rows, "
            f"the first being {finished.row(0)}"
        )
        error.__cause__ = cause
    return error
