"""Named phases of a training run, such as "decode", which a profiler can measure; without one they cost nothing."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Object whose methods are called when a phase begins or ends; phases may be nested."""

    def enter(self, name: str) -> None:
        """Called when a phase begins."""

    def leave(self) -> None:
        """Called when the innermost phase ends."""


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Replace the listener; `None` removes it."""
    global _listener
    _listener = listener


class phase:
    """Context manager for the work of one phase.

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
