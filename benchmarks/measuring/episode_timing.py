"""Time of whole episodes and of the environment in them, for textgym's agents and for step-by-step loops.

textgym's agents generate whole responses and submit them (`textgym.agents.common.rollout.collect`). Algorithms of other
libraries step through the environment token by token (`step_through`). A `Stopwatch` measures the time of both by
phase.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from measuring.peers import Figures, synchronize
from textgym.models.machine.profiled_phases import listen, phase


def step_through(envs: Any, policy: Any, options: dict[str, Any] | None = None) -> None:
    """Run one episode of full length in every row, token by token."""
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
    """Measures seconds by phase while `play` runs; nested phases have names like paths, such as "decode/decode".

    Both kinds of episodes have the same metrics, without encoding the prompt: `environment` is the time of `reset`
    and `step`, or of `reset` and `submit`; `decode` is that of all tokens after the first; and `attention` is the part
    of it in phases named "attention".
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self.path: list[str] = []
        self.started: list[float] = []

    def time(self, play: Callable[[], Any]) -> Stopwatch:
        """Run `play` once."""
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
        """Start a phase."""
        self.path.append(name)
        self.started.append(self._now())

    def leave(self) -> None:
        """End the innermost phase."""
        self.seconds["/".join(self.path)] += self._now() - self.started.pop()
        self.path.pop()

    def _now(self) -> float:
        synchronize()
        return self.clock()


def clocked(play: Callable[[], Any]) -> Callable[[], Figures]:
    """Return a function that runs `play` and returns its time."""

    def run() -> Figures:
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        play()
        synchronize()
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    return run


def endless_prompts(count: int, lines: Sequence[str]) -> list[str]:
    """Return different texts that are so long that an environment cuts each to exactly `max_prompt_tokens`."""
    return ["\n".join([*lines[row % len(lines) :], *lines[: row % len(lines)]]) for row in range(count)]
