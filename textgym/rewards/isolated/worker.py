"""The process of an `Isolated` function: reads calls from stdin, and writes what came of each to stdout.

`Isolated` runs this file as a script, so it imports nothing of textgym and starts quickly. A message is its length in 8
bytes and its content: calls are pickles, since the parent is trusted, and answers are JSON, since a function is not.

The first message has `sys.path` and the function. The parent closes stdin, or dies, to end the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import queue
import signal
import struct
import sys
import threading
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")


def read(stream: BinaryIO) -> bytes:
    """Return the next message; empty at the end."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return b""
    [length] = LENGTH.unpack(header)
    content = stream.read(length)
    return content if len(content) == length else b""


def write(stream: BinaryIO, content: bytes) -> None:
    """Write a message."""
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def main() -> None:
    """Answer calls until stdin ends."""
    calls, answers = _streams()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(calls, messages), daemon=True).start()
    function = None
    while True:
        message = messages.get()
        try:
            if function is None:
                sys.path[:], pickled = pickle.loads(message)  # the function's module is found by sys.path
                function = pickle.loads(pickled)
                answer: dict[str, Any] = {}
            else:
                answer = _call(function, pickle.loads(message))
            content = json.dumps(answer)
        except BaseException as error:  # of the function, SystemExit among them
            content = json.dumps({"error": f"{type(error).__name__}: {error}"})
        write(answers, content.encode())


def _streams() -> tuple[BinaryIO, BinaryIO]:
    """Return the streams of the protocol; what functions print goes to stderr, and they read an empty stdin."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return calls, answers


def _listen(calls: BinaryIO, messages: queue.SimpleQueue[bytes]) -> None:
    """Pass messages on; at the end of stdin, end this process and those that it started, whatever runs in them."""
    while message := read(calls):
        messages.put(message)
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _call(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Call the function; the keywords with which functions log have stand-ins, whose calls are in the answer."""
    logged: list[tuple[str, str, Any]] = []
    for keyword in arguments.pop("log_keywords"):
        arguments[keyword] = lambda name, value, keyword=keyword: logged.append((keyword, name, _plain(value)))
    values = function(**arguments)
    if inspect.isawaitable(values):
        values = asyncio.run(_awaited(values))
    return {"values": _plain(values), "logged": logged}


async def _awaited(values: Any) -> Any:
    return await values


def _plain(value: Any) -> Any:
    """Return arrays and tensors as lists, down to what is in a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
