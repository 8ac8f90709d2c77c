"""Calls reward functions: the keywords each takes, async ones beside each other, exceptions and late answers."""

from __future__ import annotations

import asyncio
import copy
import inspect
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from textgym.display import printable
from textgym.rewards.engine.background import TooLate, WorkerThread, shared_loop
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
            RewardError: another number of values than there are completions, or a name that transcripts have already.
        """
        if column in ("prompt", "completion"):
            raise RewardError(f"reward function {self.name!r} gave log_extra the name {column!r}, which is taken")
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


class Caller:
    """Calls reward functions, with a time limit for each call; its threads end with `close`, or with the caller.

    Args:
        timeout: Seconds that a function has for a batch; `None` for no limit. With a limit, plain functions run in a
            thread of their own.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._plain = WorkerThread()
        weakref.finalize(self, _end_threads, self._plain, id(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Caller, (self.timeout,)  # threads are not copied

    def close(self) -> None:
        """End the threads; a later call starts new ones."""
        _end_threads(self._plain, id(self))

    def start(self, name: str, function: RewardFunction, arguments: dict[str, Any], finished: Finished) -> PendingCall:
        """Call a function. An async one is under way in the background until its outcome is asked for.

        Args:
            name: Of the function, for errors.
            function: The function.
            arguments: Its keywords.
            finished: The rows, for errors.
        """
        try:
            result = self._call(function, arguments)
            if not inspect.isawaitable(result):
                return PendingCall(lambda: result)
        except TooLate:
            late = self._late(name, finished)
            return PendingCall(lambda: late)
        except Exception as error:
            failure = _failed(name, error, finished)
            return PendingCall(lambda: failure)
        thread = shared_loop.take(id(self))
        answer = asyncio.run_coroutine_threadsafe(_in_time(name, result, self.timeout), thread.loop)

        def waited_for() -> Any:
            try:
                return answer.result(None if self.timeout is None else self.timeout + GRACE)
            except (TooLate, TimeoutError) as error:
                if isinstance(error, TimeoutError) and answer.done():
                    return _failed(name, error, finished)  # the function's own
                answer.cancel()
                if isinstance(error, TooLate):
                    return self._late(name, finished)
                culprit = shared_loop.give_up(thread)  # the function did not even hear that its time is up
                why = f", since {culprit!r} blocks the event loop of all async functions (use await in it)"
                return self._late(name, finished, why)
            except Exception as error:
                return _failed(name, error, finished)

        return PendingCall(waited_for, answer.cancel)

    def _call(self, function: RewardFunction, arguments: dict[str, Any]) -> Any:
        if self.timeout is None or inspect.iscoroutinefunction(function):  # which only makes a coroutine
            return function(**arguments)
        return self._plain.call(lambda: function(**arguments), self.timeout)

    def _late(self, name: str, finished: Finished, why: str = "") -> RewardError:
        return RewardError(
            f"reward function {name!r} did not answer within {self.timeout:g} s for {len(finished)} rows{why}, the "
            f"first being {finished.row(0)}: raise reward_timeout?"
        )


GRACE = 1.0
"""Seconds beyond its timeout after which an async function that blocks the loop is given up."""


def _end_threads(plain: WorkerThread, user: int) -> None:
    plain.close()
    shared_loop.release(user)


async def _in_time(name: str, result: Awaitable[Any], timeout: float | None) -> Any:
    task = asyncio.current_task()
    assert task is not None  # this is one
    task.set_name(name)
    try:
        async with asyncio.timeout(timeout) as limit:
            return await result
    except TimeoutError as error:
        if limit.expired():
            raise TooLate from error
        raise  # the function's own
    except (SystemExit, KeyboardInterrupt) as error:  # it would end the loop that others wait in
        raise RuntimeError(f"{type(error).__name__} in an async reward function") from error


def _failed(name: str, cause: Exception, finished: Finished) -> RewardError:
    error = cause
    if not isinstance(error, RewardError):
        error = RewardError(
            f"reward function {name!r} raised {type(cause).__name__}: {printable(str(cause))} while scoring "
            f"{len(finished)} rows, the first being {finished.row(0)}"
        )
        error.__cause__ = cause
    return error
