"""Play for a long time, and print whether memory, threads and file descriptors grow.

    python scripts/breaking/soak.py                        # 30 minutes of a thousand rows, then 100,000 resets
    python scripts/breaking/soak.py --minutes 1 --resets 1000

A thousand rows are scored by an async function that asks a server, by a plain one with a time limit, and by one in a
process of its own. The server dies and returns every few seconds, so calls of the first fail and are penalised. The
second part resets one environment again and again. A line is printed every tenth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import sys
import threading
import time
from collections.abc import Iterator

import gymnasium as gym
import psutil

from textgym import Isolated
from textgym.testing import byte_tokenizer

DOWN, UP = 3.0, 7.0
"""Seconds that the server is away and there, in turn."""
GROWTH = 1.05
"""What memory may be at the end, in terms of that after the first tenth."""


class Server:
    """A server that answers each line with its length; it dies and returns."""

    def __init__(self) -> None:
        self.port = 0
        self.deaths = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True)
        self._thread.start()
        while not self.port:
            time.sleep(0.01)

    async def _live(self) -> None:
        while not self._ended.is_set():
            server = await asyncio.start_server(self._answer, "127.0.0.1", self.port)
            self.port = server.sockets[0].getsockname()[1]
            await asyncio.sleep(UP)
            server.close()
            await server.wait_closed()
            self.deaths += 1
            await asyncio.sleep(DOWN)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            line = await reader.readline()
            writer.write(f"{len(line)}\n".encode())
            await writer.drain()
            writer.close()

    def close(self) -> None:
        """End the server after its next death."""
        self._ended.set()
        self._thread.join()


def plain(completions: list[str]) -> list[float]:
    """Score completions by their length."""
    return [float(len(text)) for text in completions]


def state() -> tuple[float, int, int]:
    """Return MB of memory, threads and file descriptors of this process."""
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()


Progress = Iterator[tuple[float, str]]
"""The share of a part that is done, and what is counted."""


def rows(seconds: float) -> Progress:
    """Play a thousand rows for the given number of seconds."""
    server = Server()

    async def asks(completions: list[str]) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(f"{len(completions)}\n".encode())
            return [float(await reader.readline())] * len(completions)
        finally:
            writer.close()

    envs = gym.make_vec(
        "textgym:textgym/Text-v0",
        num_envs=1000,
        prompts=[f"prompt {number}" for number in range(97)],
        tokenizer=byte_tokenizer(),
        reward=[asks, plain, Isolated(plain, timeout=60.0)],
        on_reward_error="penalise",
        max_reward_failures=1.0,
        reward_timeout=60.0,
        max_new_tokens=8,
    )
    envs.reset(seed=0)
    started, steps, failures = time.monotonic(), 0, 0
    while time.monotonic() - started < seconds:
        envs.step(envs.action_space.sample())
        steps += 1
        failures = envs.unwrapped.scorer.errors["asks"]
        done = (time.monotonic() - started) / seconds
        yield done, f"{steps:,} steps, {failures:,} rows failed, {server.deaths} deaths of the server"
    envs.close()
    server.close()
    if server.deaths > 1:
        assert failures, "the server died, and nothing failed"


def resets(number: int) -> Progress:
    """Reset one environment again and again."""
    env = gym.make("textgym:textgym/Text-v0", prompts=["a", "b"], tokenizer=byte_tokenizer(), reward=plain)
    for count in range(1, number + 1):
        env.reset(seed=count if count % 10 == 0 else None)
        env.step(env.action_space.sample())
        yield count / number, f"{count:,} resets"
    env.close()


def watched(name: str, part: Progress) -> bool:
    """Run a part, print a line at every tenth of it, and return whether nothing grew after the first."""
    lines: list[tuple[float, int, int]] = []
    print(
        f"\n{name}\n\n| minutes | MB | threads | file descriptors | |\n| ---: | ---: | ---: | ---: | --- |", flush=True
    )
    started = time.monotonic()
    for done, counted in part:
        if done >= (len(lines) + 1) / 10:
            lines.append(state())
            memory, threads, files = lines[-1]
            minutes = (time.monotonic() - started) / 60
            print(f"| {minutes:.1f} | {memory:.0f} | {threads} | {files} | {counted} |", flush=True)
    memory, threads, files = state()
    print(f"| closed | {memory:.0f} | {threads} | {files} | |", flush=True)
    first, last = lines[0], lines[-1]
    return last[0] <= GROWTH * first[0] and last[1] <= first[1] + 1 and last[2] <= first[2] + 2


def main() -> None:
    """Run both parts; exit with 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--resets", type=int, default=100_000)
    arguments = parser.parse_args()
    flat = watched(f"A thousand rows for {arguments.minutes:g} minutes", rows(60 * arguments.minutes))
    flat &= watched(f"{arguments.resets:,} resets", resets(arguments.resets))
    print("\nflat" if flat else "\nsomething grew")
    sys.exit(not flat)


if __name__ == "__main__":
    main()
