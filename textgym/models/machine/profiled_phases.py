"""Phases: marks of what a training run is doing, which cost nothing unless a profiler listens."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Told of every phase that begins or ends; phases may lie within phases."""

    def enter(self, name: str) -> None:
        """A phase begins."""

    def leave(self) -> None:
        """The phase that began last ends."""


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """From now on this listener is told, and no other; `None` for nobody."""
    global _listener
    _listener = listener


class phase:
    """Marks the work in its block as a part of this phase.

    >>> with phase("decode"):
    ...     pass
    """

    __slots__ = ("listener", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.listener = _listener
        if self.listener is not None:
            self.listener.enter(self.name)

    def __exit__(self, *error: object) -> None:
        if self.listener is not None:
            self.listener.leave()
