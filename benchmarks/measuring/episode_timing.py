"""Whole episodes as agents play them and as others do, and how long the environment takes of it.

Agents write whole responses and submit them (`textgym.agents.common.rollout.collect`). Whoever brings an algorithm of
another library steps through the environment token by token (`step_through`). A `Stopwatch` tells the time of either
by phase.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from textgym.models.machine.profiled_phases import listen, phase


def step_through(envs: Any, policy: Any, options: dict[str, Any] | None = None) -> None:
    """One episode of full length in every row, token by token."""
    base_env = envs.unwrapped
    with phase("environment"):
        observation, _ = envs.reset(options=options)
    with phase("prompt"):
        action = policy.act(observation, action_masks=_masks(base_env)).action
    for _ in range(base_env.max_new_tokens - 1):
        with phase("environment"):
            observation, *_ = envs.step(action)
        with phase("decode"):
            action = policy.act(observation, action_masks=_masks(base_env)).action
    with phase("environment"):
        envs.step(action)


def _masks(base_env: Any) -> Any:
    return base_env.allowed_tokens() if base_env.restricts_actions else None


class Stopwatch:
    """Seconds by phase while `play` runs; what lies within a phase is named like a path, such as "decode/decode".

    The same figures come of either way to play, without the pass over the prompt: `environment` is the time of `reset`
    and `step`, or of `reset` and `submit`, `decode` that of all tokens but the first, and `attention` is the part of it
    that somebody marked so.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self.path: list[str] = []
        self.started: list[float] = []

    def time(self, play: Callable[[], Any]) -> Stopwatch:
        """Runs it once."""
        listen(self)
        try:
            play()
        finally:
            listen(None)
        return self

    @property
    def environment(self) -> float:
        return self.seconds["environment"]

    @property
    def decode(self) -> float:
        return self.seconds[self._tokens]

    @property
    def attention(self) -> float:
        return self.seconds[f"{self._tokens}/attention"]

    @property
    def _tokens(self) -> str:
        return "decode/decode" if "decode/decode" in self.seconds else "decode"  # `write` marks each within its whole

    def enter(self, name: str) -> None:
        """A phase begins."""
        self.path.append(name)
        self.started.append(self._now())

    def leave(self) -> None:
        """The newest phase ends."""
        self.seconds["/".join(self.path)] += self._now() - self.started.pop()
        self.path.pop()

    def _now(self) -> float:
        synchronize()
        return self.clock()


def synchronize() -> None:
    """Waits for the GPU, if there is one, so that the time of what it still does is not another's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def endless_prompts(count: int, lines: Sequence[str]) -> list[str]:
    """Different texts longer than any budget, so that an environment cuts each to exactly `max_prompt_tokens`."""
    return ["\n".join([*lines[row % len(lines) :], *lines[: row % len(lines)]]) for row in range(count)]
