"""Callbacks of `learn`: what they are, lists of them, and what `learn` adds where it is to show and keep a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from textgym.errors import ConfigError

Metrics = dict[str, float]
Function = Callable[[Any, Metrics], bool | None]
"""Called after every update with the agent and the metrics of the update; returns `False` to stop."""


class Callback:
    """Base class of callbacks of `learn`: override the methods that you need.

    A plain function of the agent and the metrics is a callback too; it is called as `on_update_end`. A callable object
    that has `on_training_start` is also told of the start.

    >>> class StopAtScore(Callback):
    ...     def on_update_end(self, agent, metrics):
    ...         return metrics["objective/scores"] < 1.0
    """

    def on_training_start(self, agent: Any) -> None:
        """Called before the first update of a call of `learn`."""

    def on_rollout_end(self, agent: Any, rollout: Any, kl: Any) -> None:
        """Called after every rollout and before its update, with the KL `(N, T)` of its tokens; not of SFT and DPO."""

    def on_update_end(self, agent: Any, metrics: Metrics) -> bool | None:
        """Called after every update with its metrics; returns `False` to stop the training.

        Metrics that it adds, numbers, are kept in the run folder, sent to trackers and drawn by the viewer.
        """

    def on_training_end(self, agent: Any) -> None:
        """Called after the last update, also of a training that a callback stopped; not after an error."""


CallbackLike = Callback | Function | Sequence[Callback | Function] | None


class CallbackList(Callback):
    """Callbacks that are called one after the other; all of them are called also after one that stops the training.

    Args:
        callbacks: A callback, several, or `None`.

    Raises:
        ConfigError: If one is neither a `Callback` nor a function.
    """

    def __init__(self, callbacks: CallbackLike) -> None:
        if callbacks is None:
            callbacks = []
        given = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        for callback in given:
            if isinstance(callback, type) or not (isinstance(callback, Callback) or callable(callback)):
                raise ConfigError(
                    f"a callback of learn is a textgym.agents.callbacks.Callback or a function of the agent and the "
                    f"metrics, got {callback!r}"
                )
        self.callbacks = [callback if isinstance(callback, Callback) else _OfFunction(callback) for callback in given]

    def on_training_start(self, agent: Any) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.on_training_start(agent)

    def on_rollout_end(self, agent: Any, rollout: Any, kl: Any) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.on_rollout_end(agent, rollout, kl)

    def on_update_end(self, agent: Any, metrics: Metrics) -> bool:
        """Call all, and return `False` if one of them did."""
        return False not in [callback.on_update_end(agent, metrics) for callback in self.callbacks]

    def on_training_end(self, agent: Any) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.on_training_end(agent)


@runtime_checkable
class _Prepared(Protocol):
    """A function that is told of the start of a training, too, such as `textgym.SyncReference`."""

    def on_training_start(self, agent: Any) -> None: ...


class _OfFunction(Callback):
    def __init__(self, function: Function) -> None:
        self.function = function

    def on_training_start(self, agent: Any) -> None:
        if isinstance(self.function, _Prepared):
            self.function.on_training_start(agent)

    def on_update_end(self, agent: Any, metrics: Metrics) -> bool | None:
        return self.function(agent, metrics)


class Session(Protocol):
    """Type of the function that shows and keeps a run while it learns: `textgym.agents.watching.session.session`."""

    def __call__(  # noqa: D102
        self, agent: Any, callback: CallbackLike, progress: bool, folder: str | Path | None, log_with: Sequence[str]
    ) -> Any: ...


_session: Session | None = None


def use_session(session: Session) -> None:
    """Set what shows and keeps runs. It imports the agents, so the agents cannot import it."""
    global _session
    _session = session


@contextmanager
def watched(
    agent: Any,
    callback: CallbackLike,
    progress: bool = False,
    folder: str | Path | None = None,
    log_with: str | Sequence[str] = (),
) -> Iterator[CallbackList]:
    """Yield the callbacks of a call of `learn`: the caller's, and those that show and keep the run."""
    names = [log_with] if isinstance(log_with, str) else list(log_with)
    if not (progress or folder is not None or names):
        yield CallbackList(callback)
        return
    assert _session is not None  # set by textgym/agents/__init__.py
    with _session(agent, callback, progress, folder, names) as callbacks:
        yield callbacks
