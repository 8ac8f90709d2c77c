"""Interrupts: Ctrl-C and SIGTERM end a run after the update at hand."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self

from rich.console import Console


class Interrupts:
    """Context manager and callback of agents: the first signal ends `learn` after the update at hand, a second at once.

    Args:
        console: where it is said.

    Attributes:
        received: number of the signal, such as `signal.SIGINT`; `None` if there was none.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __call__(self, agent: Any, metrics: Any) -> bool:
        """Return `False`, which ends the training, if there was a signal; agents call this after each update."""
        return self.received is None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self.console.print(
            f"{signal.Signals(number).name}: stopping after this update, with a checkpoint; once more stops at once",
            markup=False,
        )
