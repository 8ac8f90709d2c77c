"""Processes that run the parts of `make gpu`, see benchmarks/gpu/worker.py."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from bare_checkout import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "worker.py"


class Worker:
    """A process that runs scripts one after another, so that they share the import of torch.

    Args:
        root: Folder to run in.
        variables: Its environment variables.
    """

    def __init__(self, root: Path, variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            cwd=root,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a process group, so that its children can be stopped too
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def output_of(self, script: Path, device: str, seconds: float) -> Iterator[str]:
        """Run a script, and yield the lines that it prints; the last is `{"ended": code}`, if the worker lives on.

        Raises:
            TimeoutError: If it runs for longer than `seconds`.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `exit_code` says so
            print(json.dumps({"script": str(script), "device": device}), file=self.process.stdin, flush=True)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            dead = self.process.poll() is not None  # a child that lives on keeps the pipe open
            try:
                line = self.lines.get(timeout=min(left, 1.0))
            except queue.Empty:
                if dead:
                    return
                continue
            if not line:
                return
            if line.strip():
                yield line
            if line.startswith('{"ended"'):
                return
        raise TimeoutError

    def exit_code(self) -> int:
        """Wait until the process has ended, and return its exit code, which is never 0: it ends when it is told to."""
        return self.process.wait() or 1

    def stop(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Workers:
    """Context manager: the worker that parts share, which ends with it; a part that runs alone has one of its own.

    Args:
        device: Name of the device.
        root: Folder to run in, that of the checkout.
    """

    def __init__(self, device: str, root: Path) -> None:
        self.device, self.root = device, root
        self.shared: Worker | None = None

    def take(self, part: Any) -> Worker:
        """Return a worker for a part."""
        if not part.alone and self.shared is not None:
            return self.shared
        gpus = {} if part.all_gpus and self.device == "cuda" else visible_gpu(self.device)
        worker = Worker(self.root, {**environment(self.root), **gpus})
        if not part.alone:
            self.shared = worker
        return worker

    def stop(self, worker: Worker) -> None:
        """End a worker; the next part starts another one."""
        worker.stop()
        if worker is self.shared:
            self.shared = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shared is not None:
            self.stop(self.shared)


def visible_gpu(device: str) -> dict[str, str]:
    """Return the variable that hides all GPUs but one: other libraries take the first one, or all of them.

    >>> visible_gpu("cpu")
    {'CUDA_VISIBLE_DEVICES': ''}
    """
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if not is_gpu(device):
        return {}
    index = int(device.partition(":")[2] or 0)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": str(index) if given is None else "".join(given.split(",")[index : index + 1])}


def is_gpu(device: str) -> bool:
    """Return whether this is the name of a GPU, with a number or without."""
    return re.fullmatch(r"cuda(:\d+)?", device) is not None
