"""session: what `learn(progress=True, folder="runs/x")` shows and keeps, with the defaults of `textgym train`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..callbacks import CallbackLike, CallbackList
from ..common.rollout_agent import RolloutAgent
from ..common.supervised import SupervisedAgent
from ..machine.distributed import rank
from ..machine.named_envs import HELD_OUT, heldout_envs
from ..machine.saved_files import saved_environment
from ..runs.checkpoints import Checkpoints
from ..runs.heldout import HeldOut, judge_of
from ..runs.progress import LiveProgress
from ..runs.run_folder import RunFolder
from .run import WatchedRun
from .trackers import Trackers

EVERY = 10
"""Updates between evaluations and between checkpoints."""
RECORD_EVERY = 20
"""Updates between records; one takes three forward passes of its rows."""


@contextmanager
def session(
    agent: RolloutAgent | SupervisedAgent,
    callback: CallbackLike,
    progress: bool,
    folder: str | Path | None,
    log_with: Sequence[str],
) -> Iterator[CallbackList]:
    """Yield the callbacks of a run that is shown, kept and tracked as its caller asks; arguments as of `learn`.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM, when the update at hand and a checkpoint are done.
    """
    place = None if folder is None else Path(folder)
    checkpoints = None if place is None else Checkpoints(place / "checkpoints", EVERY)
    resumed = agent.updates > 0
    silent = rank() > 0 or not progress
    live = LiveProgress(Console(quiet=True), quiet=True) if silent else LiveProgress()
    if rank() > 0:  # the first process writes and shows for all of them
        run = WatchedRun(agent, live, checkpoints=checkpoints)
    else:
        settings = settings_of_run(agent, place)
        trackers = Trackers(log_with, place, settings) if log_with else None
        kept = None if place is None else RunFolder(place, settings, agent.updates)
        evaluation = Evaluation(agent, kept) if isinstance(agent, RolloutAgent) else None
        run = WatchedRun(
            agent,
            live,
            total_episodes=agent.total_episodes if isinstance(agent, RolloutAgent) else 0,
            folder=kept,
            heldout=None if evaluation is None else evaluation.heldout,
            checkpoints=checkpoints,
            record_every=RECORD_EVERY,
            judge=None if evaluation is None else evaluation.judge,
            trackers=trackers,
            at_the_end=None if evaluation is None else evaluation.table,
        )
    with run.learning(callback, resumed) as callbacks:
        yield callbacks
    if run.interrupts.received is not None:
        raise KeyboardInterrupt


class Evaluation:
    """The policy on held-out prompts before, while and after it learns.

    The prompts are those that an agent made of names keeps from training; of a caller's environment they are those of
    training, since it is left as it is. There is no evaluation if the environment cannot be made a second time.
    """

    def __init__(self, agent: RolloutAgent, folder: RunFolder | None) -> None:
        self.agent, self.folder = agent, folder
        self.heldout: HeldOut | None = None
        self.before = None
        spec = agent.envs.spec
        self.judge = None if spec is None else judge_of(spec.id)
        if agent.named is not None:
            envs = agent.named.heldout
        elif spec is not None and not spec.additional_wrappers:
            envs = heldout_envs(agent.envs, 0)
        else:
            return
        self.heldout = HeldOut(envs, agent.penalty.reference, EVERY, agent.config.seed, HELD_OUT)
        if agent.updates == 0:
            self.before = self.heldout.samples(agent.policy)

    def table(self) -> Table | None:
        """Return the figures before and after, and write them with the samples; `None` if one of both is not known."""
        if self.heldout is None or self.before is None:
            return None
        return self.heldout.before_and_after(self.before, self.agent.policy, self.folder, self.judge)


def settings_of_run(agent: RolloutAgent | SupervisedAgent, folder: Path | None) -> dict[str, Any]:
    """Return the settings of a run under the names of `textgym train`, which can list, show and resume it with them.

    What has no plain name, such as a reward function of the caller's, is left out; such a run is resumed in Python.
    """
    policy = agent.policy
    settings: dict[str, Any] = {
        "output_dir": None if folder is None else str(folder),
        "agent": COMMAND_NAMES.get(type(agent).__name__, type(agent).__name__.lower()),
        "critic": "shared" if policy.critic is None else "separate",
        "temperature": policy.temperature,
        "config": dataclasses.asdict(agent.config),
    }
    if not isinstance(agent, RolloutAgent):
        return settings
    settings |= {"total_episodes": agent.total_episodes, "num_envs": agent.envs.num_envs, "env_kwargs": "{}"}
    settings |= {"kl_estimator": agent.penalty.estimator, "eval_every": EVERY, "eval_prompts": HELD_OUT}
    if agent.named is not None:
        return {**settings, "env": agent.named.env, "model": agent.named.model or policy.lm.name_or_path}
    saved = saved_environment(agent.envs)
    if saved is not None:
        settings |= {"env": saved["id"], "env_kwargs": json.dumps(saved["kwargs"])}
    elif agent.envs.spec is not None:
        settings["env"] = agent.envs.spec.id
    return {**settings, "model": policy.lm.name_or_path}


COMMAND_NAMES = {"ExpertIteration": "expert-iteration", "OnlineDPO": "online-dpo"}
"""Names of agents on the command line that are not their class in small letters."""
