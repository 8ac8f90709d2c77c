"""What it costs to watch a run: CPU time of the same run with everything on and with everything off, and bytes.

    python benchmarks/watching.py                                   # 4,096 episodes, one pair of runs
    python benchmarks/watching.py --episodes 512 --pairs 2

PPO on the embedded task with the settings of `textgym train`. On are metrics, TensorBoard, curves, records of tokens,
warnings, progress, and an evaluation on 64 held-out prompts eight times. Both runs of a pair train on the same texts,
and pairs alternate which comes first. Times are CPU times of the process. Beside the difference of the runs, which
other processes disturb a little, stands the time that was spent in the callbacks themselves. The rest, without the
evaluation, should cost at most 3%, and the folder with its page should have at most 50 MB.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
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
from textgym.agents.runs.display.warning_signs import WarningSigns
from textgym.agents.runs.heldout import HeldOut
from textgym.agents.runs.progress import LiveProgress
from textgym.agents.runs.records import Recorder
from textgym.agents.runs.run_folder import RunFolder
from textgym.viewer import write_page

EVALUATIONS = 8
PROMPTS = 64


@dataclass
class Args:
    episodes: int = 4096
    """Episodes of a run."""
    pairs: int = 1
    """Pairs of runs."""


class Timed(Callback):
    """A callback whose CPU time is counted under a name."""

    def __init__(self, name: str, callback: Any, seconds: Counter[str]) -> None:
        self.name, self.seconds = name, seconds
        self.callbacks = CallbackList([callback])

    @contextmanager
    def count(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[self.name] += time.process_time() - started

    def on_training_start(self, agent: Any) -> None:
        with self.count():
            self.callbacks.on_training_start(agent)

    def on_rollout_end(self, agent: Any, rollout: Any, kl: Any) -> None:
        with self.count():
            self.callbacks.on_rollout_end(agent, rollout, kl)

    def on_update_end(self, agent: Any, metrics: Any) -> bool:
        with self.count():
            return self.callbacks.on_update_end(agent, metrics)

    def on_training_end(self, agent: Any) -> None:
        with self.count():
            self.callbacks.on_training_end(agent)


def make_agent(seed: int) -> tuple[PPO, HeldOut]:
    """Return an agent with the settings of `textgym train`, and the evaluation of its policy."""
    envs = gym.make_vec("textgym:textgym/Sentiment-v0", num_envs=64)
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


def watched(episodes: int, seed: int, run: Path) -> tuple[float, Counter[str]]:
    """Train with everything on; return the CPU seconds, and those of each part."""
    agent, heldout = make_agent(seed)
    heldout.every = max(episodes // agent.config.episodes_per_update // EVALUATIONS, 1)
    seconds: Counter[str] = Counter()

    started = time.process_time()
    folder = RunFolder(run, agent.config)
    live = LiveProgress(Console(file=io.StringIO()))
    live.stage("PPO", episodes)
    parts = {
        "evaluation": heldout,
        "metrics and TensorBoard": folder,
        "progress": live,
        "warnings": WarningSigns(agent),
        "records of tokens": Recorder(run, agent),
    }
    agent.learn(episodes, [Timed(name, callback, seconds) for name, callback in parts.items()])
    drawing = time.process_time()
    folder.draw_curves()
    folder.close()
    seconds["curves"] = time.process_time() - drawing
    return time.process_time() - started, seconds


def main(args: Args) -> None:
    torch.set_num_threads(1)
    warm, _ = make_agent(seed=0)
    warm.learn(warm.config.episodes_per_update)  # the first update of a process is slow at anything
    for pair in range(args.pairs):
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            if pair % 2:
                on, parts = watched(args.episodes, pair, run)
                off = unwatched(args.episodes, pair)
            else:
                off = unwatched(args.episodes, pair)
                on, parts = watched(args.episodes, pair, run)
            write_page([run])
            size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        rest = on - off - parts["evaluation"]
        print(
            f"\npair {pair + 1}: off {off:.1f} CPU s, on {on:.1f} CPU s, run folder with its page {size / 1e6:.1f} MB"
        )
        print(
            f"evaluation {parts['evaluation'] / off:.1%}, the rest {rest / off:.1%} of the time of the run that is off"
        )
        for name, cost in parts.most_common():
            print(f"  {name}: {cost:.2f} CPU s, {cost / off:.2%}")


if __name__ == "__main__":
    main(tyro.cli(Args))
