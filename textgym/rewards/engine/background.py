"""Threads in which reward functions run with a time limit: one for plain functions, and one with an event loop.

Python cannot stop a thread. One that is late is abandoned: nobody waits for it, an exception is raised in it, which
ends it as soon as it runs Python code again, and later calls have a new thread. Threads are daemons: they end with the
process at the latest.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from textgym.models.machine.devices import on_device


class TooLate(Exception):
    """The time of a call is up."""


class Abandoned(BaseException):
    """Raised in a thread for which nobody waits any more."""


class WorkerThread:
    """A thread that runs calls one after the other; after a late one there is a new thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """Return what a function returns.

        Raises:
            TooLate: If it takes longer than `timeout` seconds.
        """
        if self._thread is None or not self._thread.is_alive():  # after a fork it is not
            self._calls = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_run_calls, args=(self._calls,), name="textgym-rewards-plain", daemon=True
            )
            self._thread.start()
        outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._calls.put(_with_state_of_this_thread(function, outcomes))
        try:
            value, error = outcomes.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise TooLate from None
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread after the call at hand, which is abandoned."""
        if self._thread is not None:
            self._calls.put(None)
            interrupt(self._thread)
        self._thread = None


def _run_calls(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    try:
        while (call := calls.get()) is not None:
            call()
    except Abandoned:
        pass


def _with_state_of_this_thread(
    function: Callable[[], Any], outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]]
) -> Callable[[], None]:
    """Wrap a function so that another thread runs it in this thread's context, and puts what came of it into a queue.

    Whether torch records gradients, and which GPU is the current one, are settings of a thread.
    """
    context = contextvars.copy_context()
    gradients = torch.is_grad_enabled()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients), on_device(device):
                outcomes.put((context.run(function), None))
        except BaseException as error:
            outcomes.put((None, error))
            if isinstance(error, Abandoned):
                raise

    return run


class LoopThread:
    """An event loop in a thread of its own: notebooks have one running in theirs, and clients outlive a call."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="textgym-rewards-async", daemon=True)

    def start(self) -> None:
        """Start the thread; what the loop was given before waits for it."""
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._runner:  # cancels what is under way at the end
                self.loop.run_forever()
        except Abandoned:
            pass

    def stop(self) -> None:
        """End the loop, and cancel what is under way in it."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def abandon(self) -> str:
        """End the loop although something blocks it, and return the name of the task that does."""
        task = asyncio.current_task(self.loop)
        self.stop()
        interrupt(self._thread)
        return task.get_name() if task is not None else "something"


def interrupt(thread: threading.Thread) -> None:
    """Raise `Abandoned` in a thread; one that waits in C, such as in `time.sleep`, raises it when that is over."""
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Abandoned))


class SharedLoop:
    """The event loop that all scorers of this process share, from the first to the last that uses it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection may release a scorer while another one takes the loop
        self._current: LoopThread | None = None
        self._users: set[int] = set()
        self._process = os.getpid()

    def take(self, user: int) -> LoopThread:
        """Return the loop for a user, by its id, who will `release` it."""
        with self._lock:
            if self._process != os.getpid():  # a fork has no threads
                self._process, self._current, self._users = os.getpid(), None, set()
            loop, is_new = self._current or LoopThread(), self._current is None
            self._current = loop
            self._users.add(user)
        if is_new:
            # Without the lock: `start` waits for the new thread, which may begin with a garbage collection, and that
            # may release a scorer.
            loop.start()
        return loop

    def release(self, user: int) -> None:
        """End the loop if this was its last user."""
        with self._lock:
            self._users.discard(user)
            if not self._users and self._current is not None and self._process == os.getpid():
                self._current.stop()
                self._current = None

    def give_up(self, blocked: LoopThread) -> str:
        """Let later calls have a fresh loop, and return the name of the function that blocks this one."""
        with self._lock:
            if self._current is blocked:
                self._current = None
        return blocked.abandon()


shared_loop = SharedLoop()
