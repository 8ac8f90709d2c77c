"""session: what `learn(progress=True, folder="runs/x")` shows and keeps, with the defaults of `textgym train`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from textgym.errors import UntrustedNameError
from textgym.models.machine.devices import device_name
from textgym.rewards.kl import AdaptiveKL, KLController, ThresholdKL
from textgym.settings import from_plain

from ..callbacks import CallbackLike, CallbackList
from ..common.rollout_agent import RolloutAgent
from ..common.saving import start_of
from ..common.supervised import SupervisedAgent
from ..machine.distributed import rank
from ..machine.named_envs import HELD_OUT, heldout_envs
from ..machine.saved_files import read_json, refuse_foreign_code, saved_environment
from ..runs.checkpoints import Checkpoints
from ..runs.display.warning_signs import python_warning
from ..runs.heldout import Answers, HeldOut, before_and_after, judge_of
from ..runs.progress import LiveProgress
from ..runs.run_folder import FiguresTable, RunFolder
from .run import WatchedRun
from .trackers import Trackers

EVERY = 10
"""Updates between evaluations and between checkpoints."""
START = "heldout_start.json"
"""What the policy wrote to the held-out prompts at the start, for the table at the end of a run that is resumed."""
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
        live.say(f"device: {device_name(agent.policy.device)}")
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
            warn=None if progress else python_warning,
        )
    with run.learning(callback, resumed) as callbacks:
        yield callbacks
    if run.interrupts.received is not None:
        raise KeyboardInterrupt
    if run.folder is not None:
        live.say(f"go on: {' | '.join(going_on(agent, run.folder.folder))}")


class Evaluation:
    """The policy on held-out prompts before, while and after it learns.

    An agent made of names keeps these prompts from training. The environment of a caller is not changed, so there they
    are the prompts of training. There is no evaluation if the environment cannot be made a second time.
    """

    def __init__(self, agent: RolloutAgent, folder: RunFolder | None) -> None:
        self.agent, self.folder = agent, folder
        self.heldout: HeldOut | None = None
        self.before: Answers | None = None
        spec = agent.envs.spec
        self.judge = None if spec is None else judge_of(spec.id)
        if agent.named is not None:
            envs = agent.named.heldout
        elif spec is not None and not spec.additional_wrappers:
            envs = heldout_envs(agent.envs, 0)
        else:
            return
        self.heldout = HeldOut(envs, agent.penalty.reference, EVERY, agent.config.seed, HELD_OUT)
        self.before = self._start()

    def _start(self) -> Answers | None:
        """Return what the policy wrote before its first update; for a resumed run it is read from the folder."""
        agent, folder, heldout = self.agent, self.folder, self.heldout
        assert heldout is not None
        if agent.updates == 0:
            answers = heldout.answers(agent.policy)
            if folder is not None:
                folder.write_json(START, dataclasses.asdict(answers))
            return answers
        if folder is None or not (folder.folder / START).exists():
            return None
        path = folder.folder / START
        return from_plain(Answers, read_json(path), str(path))

    def table(self) -> FiguresTable | None:
        """Return the figures before and after, and write them with the samples; `None` if one of both is not known."""
        if self.heldout is None or self.before is None:
            return None
        after = self.heldout.answers(self.agent.policy)
        if self.before.prompts != after.prompts:
            warnings.warn(
                "there is no table of before and after, since the run began with other held-out prompts than it ended "
                "with: resume it in the environment that it began in",
                stacklevel=2,
            )
            return None
        return before_and_after(self.before, after, self.folder, self.judge)


def going_on(agent: RolloutAgent | SupervisedAgent, folder: Path) -> list[str]:
    """Return the commands to type next; if a run has objects that no command can make, what to write in Python."""
    settings, run = read_json(folder / "config.json"), shlex.quote(str(folder))
    view = f"textgym view {run}"
    if isinstance(agent, RolloutAgent):
        named = agent.named is not None or saved_environment(agent.envs) is not None
        named = named and str(agent.envs.spec.vector_entry_point).startswith("textgym.")
    else:
        named = "data" in settings
    if not (named and settings["model"]):
        kind, newest = type(agent).__name__, Checkpoints(folder / "checkpoints").newest()
        return [view, f"in Python: {kind}.load({str(newest)!r}, ...).learn(..., folder={str(folder)!r})"]
    if isinstance(agent, RolloutAgent):
        longer = f"--total-episodes {2 * agent.total_episodes}"
    elif agent.config.max_steps is None:
        longer = f"--epochs {2 * agent.config.epochs:g}"
    else:
        longer = f"--max-steps {2 * agent.config.max_steps}"
    trust = " --trust-names" if names_foreign_code(settings) else ""
    evaluate, chat, resume = (f"textgym {command} {run}{trust}" for command in ("evaluate", "chat", "resume"))
    return [view, evaluate, chat, f"{resume} {longer}"]


def names_foreign_code(settings: Mapping[str, Any]) -> bool:
    """Return whether settings name functions that are not textgym's, which commands import only if told to."""
    try:
        arguments = json.loads(settings.get("env_kwargs") or "{}")
        for name, value in {**arguments, "data": settings.get("data")}.items():
            refuse_foreign_code(name, value, Path("config.json"), "")
    except UntrustedNameError:
        return True
    return False


def settings_of_run(agent: RolloutAgent | SupervisedAgent, folder: Path | None) -> dict[str, Any]:
    """Return the settings of a run under the names of `textgym train`, which can list, show and resume it with them.

    What has no plain name, such as a reward function of the caller's, is left out; such a run is resumed in Python.
    """
    policy = agent.policy
    settings: dict[str, Any] = {
        "output_dir": None if folder is None else str(folder),
        "agent": COMMAND_NAMES.get(type(agent).__name__, type(agent).__name__.lower()),
        "model": began_with(agent, folder),
        "critic": "shared" if policy.critic is None else "separate",
        "temperature": policy.temperature,
        "config": dataclasses.asdict(agent.config),
    }
    if not isinstance(agent, RolloutAgent):
        return settings if agent.source is None else {**settings, "data": agent.source}
    settings |= {"total_episodes": agent.total_episodes, "num_envs": agent.envs.num_envs, "env_kwargs": "{}"}
    settings |= {"kl_estimator": agent.penalty.estimator, "eval_every": EVERY, "eval_prompts": HELD_OUT}
    settings |= kl_settings(agent.penalty.controller)
    if agent.named is not None and agent.named.model is not None:  # a loaded one may have further arguments
        return {**settings, "env": agent.named.env}
    saved = saved_environment(agent.envs)
    if saved is not None:
        kwargs = {name: value for name, value in saved["kwargs"].items() if name != "device"}  # one of the run
        settings |= {"env": saved["id"], "env_kwargs": json.dumps(kwargs)}
    elif agent.envs.spec is not None:
        settings["env"] = agent.envs.spec.id
    return settings


def began_with(agent: RolloutAgent | SupervisedAgent, folder: Path | None) -> str:
    """Return the name of the model that a run began from; empty if it has no name.

    A run that is continued in its folder keeps the name in its `config.json`.
    """
    if agent.updates and folder is not None and (folder / "config.json").exists():
        return str(read_json(folder / "config.json").get("model") or "")
    return start_of(agent)


def kl_settings(controller: KLController) -> dict[str, Any]:
    """Return the flags of the command that say what the KL is steered to; of a fixed coefficient there are none."""
    if isinstance(controller, AdaptiveKL):
        return {"kl_target": controller.target}
    return {"kl_bounds": [controller.low, controller.high]} if isinstance(controller, ThresholdKL) else {}


COMMAND_NAMES = {"ExpertIteration": "expert-iteration", "OnlineDPO": "online-dpo"}
"""Names of agents on the command line that are not their class in small letters."""
