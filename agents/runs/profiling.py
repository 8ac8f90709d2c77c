"""Profiler: time, floating-point operations and memory of a training run, by phase.

    textgym train --output-dir runs/ppo --profile

It measures the first six updates. They train as usual:
    1. One update is skipped, because first calls are slow.
    2. Three updates are timed.
    3. In one update floating-point operations, activations and peak memory are measured, which is slow.
    4. One update is traced into `trace.json.gz`, for Perfetto or chrome://tracing.
Phases do not overlap: the time of a nested phase is not part of the outer phase's. "other" is all work outside of named
phases, such as computing and writing metrics. On a GPU the profiler waits for the device at each start and end of a
phase, so that work of one phase is not timed in the next. A run without `--profile` does not wait.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from textgym.data.files import atomic_file
from textgym.models.machine.flops import FlopCount
from textgym.models.machine.profiled_phases import listen

from ..common.rollout_agent import Metrics, RolloutAgent
from ..machine.device_limits import peak_flops, peak_memory, reset_peak_memory
from ..machine.memory_by_role import SavedForBackward, bytes_by_role, cache_bytes

TIMED = 3
UPDATES = 1 + TIMED + 1 + 1
TRACED_CALLS = 32
"""Maximum number of calls of each phase in the trace; without it the trace grows with the length of episodes."""
PHASES = ("decode", "environment", "reference", "reward", "critic", "update")
OTHER = "other"


@dataclass
class PhaseFigures:
    """Metrics of one phase, for one update.

    Attributes:
        seconds: Time.
        share: Share of the update's time.
        tokens_per_second: Response tokens of an update divided by `seconds`. Several epochs over the same tokens count
            them once.
        flops: Floating-point operations of matrix products and attention; a multiply-add counts as two.
        utilisation: `flops` divided by the operations that the device could do in this time, see `Profile.peaks`.
        memory: Peak memory in bytes: resident memory of the process, or allocated memory on a GPU.
    """

    seconds: float
    share: float
    tokens_per_second: float
    flops: float
    utilisation: float
    memory: int


@dataclass
class Profile:
    """Results of `Profiler`.

    Attributes:
        device: Name of the device.
        updates: Number of timed updates.
        tokens: Mean number of response tokens of a timed update.
        peaks: Peak operations per second by dtype, as `peak_flops` measures them.
        peak_of: How the peaks were measured.
        phases: Metrics of each phase; with "other" they are the whole update.
        memory: Bytes by role.
    """

    device: str
    updates: int
    tokens: float
    peaks: dict[str, float]
    peak_of: str
    phases: dict[str, PhaseFigures]
    memory: dict[str, int]

    @property
    def seconds(self) -> float:
        """Seconds of an update."""
        return sum(phase.seconds for phase in self.phases.values())

    def tables(self) -> list[Table]:
        """Return tables of time by phase and of memory by role for the terminal."""
        return [_table(*content) for content in self._contents()]

    def markdown(self) -> str:
        """Return the tables as Markdown for `profile.md`."""
        parts = []
        for title, columns, rows in self._contents():
            lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
            parts.append(f"{title}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n")
        return "\n".join(parts)

    def _contents(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Yield title, column names and rows of each table."""
        peaks = ", ".join(f"{peak / 1e9:.1f} GFLOP/s in {dtype}" for dtype, peak in self.peaks.items())
        kind = "resident" if self.device == "cpu" else "allocated"
        rows = [
            [
                name,
                f"{x.seconds:.3f}",
                f"{x.share:.1%}",
                f"{x.tokens_per_second:,.0f}" if x.seconds else "",
                f"{x.flops / 1e9:.3f}",
                f"{x.utilisation:.1%}",
                f"{x.memory / 2**20:,.0f}",
            ]
            for name, x in self.phases.items()
        ]
        speed, flops = self.tokens / self.seconds, sum(x.flops for x in self.phases.values())
        memory = max(x.memory for x in self.phases.values()) / 2**20
        total = f"{self.seconds:.3f}", "100.0%", f"{speed:,.0f}", f"{flops / 1e9:.3f}", "", f"{memory:,.0f}"
        title = f"An update of {self.tokens:,.0f} response tokens on {self.device}, the mean of {self.updates}. "
        yield (
            title + f"MFU (FLOP utilisation) is of {peaks}: {self.peak_of}.",
            ["phase", "seconds", "share", "tokens/s", "GFLOP", "MFU", f"peak MiB {kind}"],
            [*rows, ["all", *total]],
        )
        yield (
            "Tensors by role.",
            ["role", "MiB"],
            [[role, f"{count / 2**20:,.2f}"] for role, count in self.memory.items()],
        )


class Profiler:
    """Callback that measures updates of an agent that learns from rollouts; put it last in the list of callbacks.

    Args:
        folder: Folder for `profile.md`, `profile.json` and `trace.json.gz`.
        agent: The agent.
        total_episodes: Number of episodes of the run.

    Attributes:
        profile: Results, after `UPDATES` updates.

    Raises:
        ValueError: If the run has fewer than `UPDATES` updates.
    """

    def __init__(self, folder: str | Path, agent: RolloutAgent, total_episodes: int) -> None:
        size = agent.config.episodes_per_update
        left = agent.updates_left(total_episodes)
        if left < UPDATES:
            raise ValueError(
                f"a profile takes {UPDATES} updates and this run makes {left}: play at least "
                f"{agent.episodes + UPDATES * size} episodes"
            )
        self.folder, self.agent = Path(folder), agent
        self.profile: Profile | None = None
        self.tokens: list[float] = []
        self.timer, self.counts = _Timer(agent.policy.device), _Counts(agent)
        self.seen = 0

    def __call__(self, agent: RolloutAgent, metrics: Metrics) -> None:
        """End the measurement of the last update and start that of the next one; called after each update."""
        self.seen += 1
        if self.seen <= UPDATES - 1:
            self.tokens.append(metrics["val/response_tokens"] * agent.update_size)
        if self.seen == 1:
            self.timer.start()
        elif self.seen == 1 + TIMED:
            self.timer.stop()
            self.counts.start()
        elif self.seen == 1 + TIMED + 1:
            self.counts.stop()
            self.trace = _Trace(agent.policy.device)
        elif self.seen == UPDATES:
            self.trace.stop(self.folder / "trace.json.gz")
            self.profile = self._summary()
            with atomic_file(self.folder / "profile.md") as temporary:
                temporary.write_text(self.profile.markdown())
            with atomic_file(self.folder / "profile.json") as temporary:
                temporary.write_text(json.dumps(asdict(self.profile), indent=2) + "\n")

    def close(self) -> None:
        """Stop measuring, for runs that end early."""
        listen(None)
        self.counts.stack.close()

    def _summary(self) -> Profile:
        """Compute the profile from all measurements."""
        agent, device = self.agent, self.agent.policy.device
        dtype = agent.policy.lm.dtype
        trained = torch.bfloat16 if agent.config.bf16 else dtype
        peaks = {kind: peak_flops(device, kind) for kind in dict.fromkeys((dtype, trained))}
        tokens = sum(self.tokens[1 : 1 + TIMED]) / TIMED
        seconds = {name: total / TIMED for name, total in self.timer.seconds.items()}
        total_seconds = sum(seconds.values())
        scale = tokens / self.tokens[1 + TIMED]  # the update whose operations were counted has other response lengths
        phases = {}
        for name in dict.fromkeys((*PHASES, *seconds)):
            phase_seconds = seconds.get(name, 0.0)
            flops = self.counts.flops[name] * scale
            possible = phase_seconds * peaks[trained if name == "update" else dtype].flops
            phases[name] = PhaseFigures(
                phase_seconds,
                phase_seconds / total_seconds,
                tokens / phase_seconds if phase_seconds else 0.0,
                flops,
                flops / possible if possible else 0.0,
                self.counts.memory[name],
            )
        phases[OTHER] = phases.pop(OTHER)  # the last row of the table
        return Profile(
            device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            TIMED,
            tokens,
            {str(kind).removeprefix("torch."): peak.flops for kind, peak in peaks.items()},
            peaks[dtype].how,
            phases,
            self.counts.roles,
        )


class _Phases:
    """Listener that assigns what it measures to the innermost phase."""

    def __init__(self) -> None:
        self.open = [OTHER]

    def enter(self, name: str) -> None:
        if name != self.open[-1]:  # a phase nested in itself changes nothing
            self.charge(self.open[-1])
        self.open.append(name)

    def leave(self) -> None:
        name = self.open.pop()
        if name != self.open[-1]:
            self.charge(name)

    def charge(self, name: str) -> None:
        """Assign everything since the last call to this phase."""
        raise NotImplementedError


class _Timer(_Phases):
    """Measures seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def start(self) -> None:
        self.last = self._now()
        listen(self)

    def stop(self) -> None:
        self.charge(OTHER)
        listen(None)

    def charge(self, name: str) -> None:
        now = self._now()
        self.seconds[name] += now - self.last
        self.last = now

    def _now(self) -> float:
        """Return the time after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Counts(_Phases):
    """Measures floating-point operations and peak memory by phase, and bytes by role."""

    def __init__(self, agent: RolloutAgent) -> None:
        super().__init__()
        self.agent, self.stack = agent, contextlib.ExitStack()
        self.flops: Counter[str] = Counter()
        self.memory: Counter[str] = Counter()
        self.cache = 0

    def start(self) -> None:
        policy = self.agent.policy
        self.counter = self.stack.enter_context(FlopCount())
        self.saved = SavedForBackward([*policy.parameters(), *policy.buffers()])
        self.stack.enter_context(self.saved)
        reset_peak_memory(policy.device)
        listen(self)

    def stop(self) -> None:
        self.charge(OTHER)
        listen(None)
        self.stack.close()
        self.roles = {
            **bytes_by_role(self.agent),
            "key-value caches": self.cache,
            "activations": self.saved.peak,
        }

    def charge(self, name: str) -> None:
        self.flops[name] += self.counter.total
        self.counter.by_operation.clear()
        self.cache = max(self.cache, cache_bytes(self.agent))
        self.memory[name] = max(self.memory[name], peak_memory(self.agent.policy.device))
        reset_peak_memory(self.agent.policy.device)


class _Trace(_Phases):
    """Traces the operations of the first calls of each phase; starts when it is made."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.activities, self.calls = activities, Counter[str]()
        self.marks: list[Any] = []
        self.profile = profile(activities=activities)
        self.profile.start()
        listen(self)

    def enter(self, name: str) -> None:
        self.calls[name] += 1
        self.marks.append(record_function(name) if self.calls[name] <= TRACED_CALLS else None)
        if self.marks[-1] is None:
            self.profile.toggle_collection_dynamic(False, self.activities)
        else:
            self.marks[-1].__enter__()

    def leave(self) -> None:
        mark = self.marks.pop()
        if mark is None:
            self.profile.toggle_collection_dynamic(None not in self.marks, self.activities)
        else:
            mark.__exit__(None, None, None)

    def stop(self, path: Path) -> None:
        listen(None)
        self.profile.stop()
        temporary = path.with_name(f".tmp-{path.name}")  # the suffix .gz makes torch compress the file
        self.profile.export_chrome_trace(str(temporary))
        temporary.rename(path)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(columns):
        widest = max(len(row[number]) for row in rows)  # a narrow terminal may wrap headers but must not cut numbers
        table.add_column(column, justify="right" if number else "left", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table
