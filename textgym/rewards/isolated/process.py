"""Isolated: a reward function in a process of its own, which is killed when it is late or too large."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import cloudpickle
import psutil

from textgym.display import printable
from textgym.errors import IsolatedError
from textgym.rewards.isolated import worker
from textgym.settings import Check, Positive, check_arguments

START_LIMIT = 120.0
"""Seconds in which the process must have started and imported the function."""
INTERVAL = 0.05
"""Seconds between two looks at the memory."""
LOG_KEYWORDS = ("log_metric", "log_extra")
ANSWERS: tuple[set[str], ...] = (set(), {"error"}, {"values", "logged"})
"""Keys of the answers: after the import, after a failure, after a call."""
SMALLEST = 64 * 2**20
Bytes = Annotated[
    int, Check(f"a number of bytes, at least {SMALLEST} (64 MiB)", lambda value: SMALLEST <= value < 2**63)
]


class Isolated:
    """A reward function that runs in a process of its own, for functions that may hang, crash or fill the memory.

    The function gets copies of its inputs. If a call is late, needs too much memory, or ends the process, the process
    and all processes that it started are killed, all rows of the call have failed, and the next call has a new process.

    This is no sandbox: the function has your rights, your files and your network. If it executes what a model wrote,
    give that code a container or a virtual machine without network; docs/rewards.md says how.

    Args:
        function: The reward function, plain or async. It is sent to the process by cloudpickle, so it may be a lambda
            or be defined in a notebook. Its results come back as JSON: numbers, `None` and lists of these.
        timeout: Seconds that a call may take; starting the process and importing the function does not count.
        memory: Bytes that the process and those it starts may have together; 2 GiB if not given.

    Raises:
        ConfigError: If an argument is not in its range.
    """

    @check_arguments
    def __init__(self, function: Callable[..., Any], timeout: Positive = 30.0, memory: Bytes = 2 * 2**30) -> None:
        self.function, self.timeout, self.memory = function, timeout, memory
        functools.update_wrapper(self, function)
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__signature__ = inspect.signature(function)  # the scorer reads which keywords it takes
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Isolated, (self.function, self.timeout, self.memory)

    def __call__(self, **arguments: Any) -> Any:
        """Call the function in its process.

        Raises:
            IsolatedError: If the function raised an exception, was late or too large, or ended its process.
        """
        loggers = {keyword: arguments.pop(keyword) for keyword in LOG_KEYWORDS if keyword in arguments}
        with self._lock:
            try:
                if self._process is None or not self._process.lives():
                    self.close()
                    self._process = self._started()
                message = cloudpickle.dumps({**arguments, "log_keywords": list(loggers)})
                answer = self._process.ask(message, self.timeout, "a call")
            except BaseException:  # its process is killed, or waits for nobody
                self.close()
                raise
        if "error" in answer:
            raise IsolatedError(printable(str(answer["error"])))
        for keyword, name, value in answer["logged"]:
            loggers[keyword](name, value)
        return answer["values"]

    def _started(self) -> _Process:
        process = _Process(self.memory)
        message = cloudpickle.dumps((sys.path, cloudpickle.dumps(self.function)))
        answer = process.ask(message, START_LIMIT, "importing the function")
        if "error" in answer:
            raise IsolatedError(f"{self.__name__!r} cannot be imported in another process: {answer['error']}")
        return process

    def close(self) -> None:
        """Kill the process; a later call starts a new one."""
        if self._process is not None:
            self._process.kill()
        self._process = None


class _Process:
    """A process of worker.py; it ends when this object does."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.popen = subprocess.Popen(
            [sys.executable, "-P", str(Path(worker.__file__))],  # -P: the script's folder is not on sys.path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that it is killed with what it starts, and Ctrl-C is for the run alone
        )
        self.kill = weakref.finalize(self, _kill, self.popen, os.getpid())

    def lives(self) -> bool:
        """Return whether the process is running."""
        return self.popen.poll() is None

    def ask(self, message: bytes, timeout: float, what: str) -> dict[str, Any]:
        """Send a message, and return the answer.

        Raises:
            IsolatedError: If the process is late, too large, or has ended.
        """
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_exchange, args=(self.popen, message, answers), daemon=True).start()
        deadline = time.monotonic() + timeout
        while True:
            try:
                answer = answers.get(timeout=INTERVAL)
                break
            except queue.Empty:
                pass
            used = _memory(self.popen.pid)
            if used > self.memory:
                raise IsolatedError(
                    f"{what} used {used:,} bytes, more than memory={self.memory:,}: its process was killed"
                )
            if time.monotonic() > deadline:
                raise IsolatedError(f"{what} took longer than timeout={timeout:g} s: its process was killed")
        if not answer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout=1)
            raise IsolatedError(f"{what} ended its process ({_ended(self.popen.poll())})")
        return _checked(answer)


def _exchange(popen: subprocess.Popen[bytes], message: bytes, answers: queue.SimpleQueue[bytes]) -> None:
    """Write a message and read the answer, in a thread because both may block; the answer is empty if there is none."""
    calls, results = cast(BinaryIO, popen.stdin), cast(BinaryIO, popen.stdout)
    try:
        worker.write(calls, message)
        answers.put(worker.read(results))
    except (OSError, ValueError):  # the process has ended, or was killed
        answers.put(b"")


def _checked(content: bytes) -> dict[str, Any]:
    """Return an answer, which another process may have written anything into."""
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise IsolatedError(f"the process answered with something that is not JSON ({error})") from error
    if not (isinstance(answer, dict) and answer.keys() in ANSWERS):
        raise IsolatedError("the process answered with something that is not a function's result")
    return answer


def _memory(pid: int) -> int:
    """Return the bytes of a process and of those that it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += each.memory_info().rss
    return total


def _ended(code: int | None) -> str:
    if code is None:
        return "it still runs, but answers no more"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill(popen: subprocess.Popen[bytes], parent: int) -> None:
    """Kill a process and those that it started; a fork of its parent does nothing."""
    if os.getpid() != parent:
        return
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(popen.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(popen.pid, signal.SIGKILL)
        else:
            popen.kill()
    for process in started:  # those that left its group
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    popen.wait()
    for pipe in (popen.stdin, popen.stdout):
        with contextlib.suppress(OSError):
            cast(BinaryIO, pipe).close()
