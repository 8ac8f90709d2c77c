"""What it costs to watch a run: CPU time of the same run with everything on and with everything off, and bytes.

    python benchmarks/watching.py                                   # 4,096 episodes, one pair of runs
    python benchmarks/watching.py --episodes 512 --pairs 2

PPO on the embedded task with the settings of `textgym train`. On is all that a run of it has: the live table of a
terminal, metrics, TensorBoard twice (the run folder's and the tracker's), records of tokens with a judge, warnings,
checkpoints, curves, the saved policy, an evaluation on 64 held-out prompts eight times and for the closing table, and
the page of `textgym view` at the end. Both runs of a pair train on the same texts, and pairs alternate which comes
first. Times are CPU times of the process. Beside the difference of the runs, which other processes disturb a little,
stands the time that was spent in the parts themselves. The rest, without the evaluation, should cost at most 3%, and
the folder with its page should have at most 50 MB.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import tyro
from rich.console import Console

from textgym import ActorCritic
from textgym.agents import PPO, PPOConfig
from textgym.agents.callbacks import Callback, CallbackList
from textgym.agents.machine.named_envs import heldout_envs
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.heldout import HeldOut, before_and_after, judge_of
from textgym.agents.runs.progress import LiveProgress
from textgym.agents.runs.run_folder import RunFolder
from textgym.agents.watching.run import WatchedRun
from textgym.agents.watching.session import EVERY, RECORD_EVERY
from textgym.agents.watching.trackers import Trackers
from textgym.viewer import write_page

ENV = "textgym/Sentiment-v0"
EVALUATIONS = 8
PROMPTS = 64
OF_EVALUATION = ("HeldOut", "answers of the start", "closing table")
"""Parts that belong to the evaluation; those with a capital are callbacks."""
WEIGHTS = ("checkpoints", "policy")
"""Folders of a run that hold weights."""


@dataclass
class Args:
    episodes: int = 4096
    """Episodes of a run."""
    pairs: int = 1
    """Pairs of runs."""


class Parts(Counter[str]):
    """CPU seconds of the parts of a run."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        started = time.process_time()
        yield
        self[name] += time.process_time() - started


class Timed(Callback):
    """A callback whose CPU time is counted under its name."""

    def __init__(self, callback: Any, parts: Parts) -> None:
        self.name, self.parts = getattr(callback, "__name__", type(callback).__name__), parts
        self.callbacks = CallbackList([callback])

    def on_training_start(self, agent: Any) -> None:
        with self.parts.timed(self.name):
            self.callbacks.on_training_start(agent)

    def on_rollout_end(self, agent: Any, rollout: Any, kl: Any) -> None:
        with self.parts.timed(self.name):
            self.callbacks.on_rollout_end(agent, rollout, kl)

    def on_update_end(self, agent: Any, metrics: Any) -> bool:
        with self.parts.timed(self.name):
            return self.callbacks.on_update_end(agent, metrics)

    def on_training_end(self, agent: Any) -> None:
        with self.parts.timed(self.name):
            self.callbacks.on_training_end(agent)


class TimedCheckpoints(Checkpoints):
    """Checkpoints whose CPU time is counted, those before and after the training too."""

    def __init__(self, folder: Path, every: int, parts: Parts) -> None:
        super().__init__(folder, every)
        self.parts = parts

    def save(self, agent: Any) -> None:
        with self.parts.timed("checkpoints"):
            super().save(agent)


class TimedRun(WatchedRun):
    """A watched run whose parts are timed."""

    def __init__(self, agent: Any, live: LiveProgress, parts: Parts, **settings: Any) -> None:
        super().__init__(agent, live, **settings)
        self.parts = parts

    def _callbacks(self, given: Sequence[Callback]) -> list[Any]:
        found = super()._callbacks(given)
        return [each if isinstance(each, TimedCheckpoints) else Timed(each, self.parts) for each in found]

    def _close(self) -> None:
        with self.parts.timed("curves and the saved policy"):
            super()._close()


def make_agent(seed: int) -> tuple[PPO, HeldOut]:
    """Return an agent with the settings of `textgym train`, and the evaluation of its policy."""
    envs = gym.make_vec(f"textgym:{ENV}", num_envs=64)
    heldout = heldout_envs(envs, PROMPTS)
    policy = ActorCritic.from_pretrained("tiny", critic="separate")
    agent = PPO(policy, envs, PPOConfig(critic_learning_rate=3e-4, seed=seed))
    return agent, HeldOut(heldout, agent.penalty.reference, seed=seed, samples=PROMPTS)


def unwatched(episodes: int, seed: int) -> float:
    """Train with everything off; return the CPU seconds."""
    agent, _ = make_agent(seed)
    started = time.process_time()
    agent.learn(episodes)
    return time.process_time() - started


def watched(episodes: int, seed: int, run: Path) -> tuple[float, Parts]:
    """Train with everything on; return the CPU seconds, and those of each part."""
    agent, heldout = make_agent(seed)
    heldout.every = max(episodes // agent.config.episodes_per_update // EVALUATIONS, 1)
    parts = Parts()

    started = time.process_time()
    folder = RunFolder(run, agent.config)
    judge = judge_of(ENV)
    with parts.timed("answers of the start"):
        before = heldout.answers(agent.policy)

    def closing_table() -> Any:
        with parts.timed("closing table"):
            return before_and_after(before, heldout.answers(agent.policy), folder, judge)

    watching = TimedRun(
        agent,
        LiveProgress(Console(file=io.StringIO(), force_terminal=True, width=120)),
        parts,
        total_episodes=episodes,
        folder=folder,
        heldout=heldout,
        checkpoints=TimedCheckpoints(run / "checkpoints", EVERY, parts),
        record_every=RECORD_EVERY,
        judge=judge,
        trackers=Trackers(["tensorboard"], run, dataclasses.asdict(agent.config)),
        at_the_end=closing_table,
    )
    with watching.learning() as callbacks:
        agent.learn(episodes, callbacks)
    with parts.timed("page"):
        write_page([run])
    return time.process_time() - started, parts


def megabytes(run: Path) -> tuple[float, float]:
    """Return the size of a run folder without and of its weights."""
    files = [path for path in run.rglob("*") if path.is_file()]
    weights = [path for path in files if path.relative_to(run).parts[0] in WEIGHTS]
    whole, heavy = (sum(path.stat().st_size for path in group) / 1e6 for group in (files, weights))
    return whole - heavy, heavy


def main(args: Args) -> None:
    torch.set_num_threads(1)
    warm, _ = make_agent(seed=0)
    warm.learn(warm.config.episodes_per_update)  # the first update of a process is always slow
    for pair in range(args.pairs):
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            if pair % 2:
                on, parts = watched(args.episodes, pair, run)
                off = unwatched(args.episodes, pair)
            else:
                off = unwatched(args.episodes, pair)
                on, parts = watched(args.episodes, pair, run)
            size, weights = megabytes(run)
        evaluation = sum(parts[name] for name in OF_EVALUATION)
        rest, counted = on - off - evaluation, sum(parts.values()) - evaluation
        print(f"\npair {pair + 1}: off {off:.1f} CPU s, on {on:.1f} CPU s")
        print(f"run folder with its page {size:.1f} MB, checkpoints and policy {weights:.1f} MB")
        print(f"evaluation {evaluation / off:.1%} of the time of the run that is off")
        print(f"the rest {rest / off:.1%} by the difference, {counted / off:.1%} by what was counted in its parts")
        for name, cost in parts.most_common():
            print(f"  {name}: {cost:.2f} CPU s, {cost / off:.2%}")


if __name__ == "__main__":
    main(tyro.cli(Args))
