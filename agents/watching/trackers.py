"""Trackers: metrics, samples and settings of a run in Weights & Biases, MLflow, TensorBoard and others of accelerate.

    textgym train --output-dir runs/ppo --log-with wandb,tensorboard
    agent.learn(4096, folder="runs/ppo", log_with="mlflow")

accelerate's trackers have the settings that their libraries read from the environment, such as `WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI=sqlite:///runs.db` and `TRACKIO_DIR`; `PATIENCE` has those that say how long they wait. The project
is "textgym"; `WANDB_PROJECT`, `MLFLOW_EXPERIMENT_NAME` and `TRACKIO_PROJECT` name another one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, tracking

from textgym.data.continuations import decode_continuation
from textgym.display import markdown_cell
from textgym.errors import ConfigError
from textgym.settings import nearest

from ..callbacks import Callback, Metrics
from ..common.rollout import Rollout
from ..runs.progress import clock
from ..runs.records import HostRollout

PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "aim": ("aim", "aim"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "clearml": ("clearml", "clearml"),
    "dvclive": ("dvclive", "dvclive"),
    "swanlab": ("swanlab", "swanlab"),
}
"""Trackers: the module of each, and the name that pip knows it by."""
PATIENCE = {
    "mlflow": {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"},
    "wandb": {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"},
}
"""Environment variables of trackers, which are set if the user has not. Without them MLflow tries for four minutes to
reach a server, before and after the training and at the end of the process, and Weights & Biases waits for its server
at the end of the run for as long as it takes; what is not sent by then can be sent by `wandb sync`."""
PROJECT = "textgym"
COLUMNS = ("prompt", "completion", "score")
SAMPLES = 8
SAMPLES_EVERY = 10
"""Updates from one table of samples to the next."""


class Trackers(Callback):
    """Callback that sends settings, metrics of each update, tables of samples and the closing table to trackers.

    If a tracker fails, there is one warning, it gets nothing more, and the training continues.

    Args:
        names: Names of trackers, each of them one of `PACKAGES` or several with commas between them.
        folder: The run folder, whose name is the name of the run; TensorBoard's events are written into
            `trackers/tensorboard` in it, or in `runs` if it is `None`.
        settings: Settings of the run.

    Raises:
        ConfigError: If there is no such tracker.
        ImportError: If its package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None, settings: Mapping[str, Any] | None = None):
        self.names = list(dict.fromkeys(name for given in names for name in given.replace(",", " ").split()))
        for name in self.names:
            check_tracker(name)
        self.folder, self.settings = folder, flat(settings or {})
        self.trackers: dict[str, Any] = {}
        self.samples: list[list[Any]] = []
        self.step = 0

    def on_training_start(self, agent: Any) -> None:
        """Open a run in each tracker, with the settings of this one."""
        PartialState(cpu=not torch.accelerator.is_available())  # accelerate's trackers refuse to log without it
        for name in self.names:
            self._attempt(name, partial(self._open, name))

    def on_rollout_end(self, agent: Any, rollout: Rollout, kl: Any) -> None:
        """Keep some of what the policy wrote in the first and in every tenth update."""
        if self.trackers and (agent.updates == 0 or (agent.updates + 1) % SAMPLES_EVERY == 0):
            self.samples = samples_of(rollout[:SAMPLES], agent.base_env.tokenizer)

    def on_update_end(self, agent: Any, metrics: Metrics) -> None:
        """Send the metrics of an update, and now and then what the policy wrote."""
        step = int(metrics[clock(metrics)])
        rows, self.samples, self.step = self.samples, [], step
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, partial(tracker.log, allowed(name, metrics), step=step))
            if rows and name in self.trackers:
                self._attempt(name, partial(log_samples, name, tracker, rows, step))

    def send_figures(self, table: Mapping[str, Mapping[str, float | str]]) -> None:
        """Send the figures before and after the training, unless it made no update: then they were sent before."""
        if not self.step:
            return
        columns = {column: table[column] for column in ("before", "after")}
        figures = flat({"closing": columns})
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, partial(tracker.log, allowed(name, figures), step=self.step))

    def close(self) -> None:
        """Close the run in each tracker."""
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, tracker.finish)
        self.trackers = {}

    def _open(self, name: str) -> None:
        for variable, value in PATIENCE.get(name, {}).items():
            os.environ.setdefault(variable, value)  # it stays, since libraries send something at the end of the process
        tracker = tracker_of(name, self.folder)
        tracker.start()
        self.trackers[name] = tracker
        tracker.store_init_configuration(allowed(name, self.settings))

    def _attempt(self, name: str, call: Callable[[], Any]) -> None:
        """Call a tracker, and leave it out after an error: a run must not end because a server does not answer."""
        try:
            call()
        except Exception as error:  # anything that the libraries of others raise
            self.trackers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"the tracker {name} failed and gets nothing more of this run ({reason})", stacklevel=2)


def check_tracker(name: str) -> None:
    """Check that there is a tracker of this name, and that it is installed; errors as `Trackers`."""
    if name not in PACKAGES:
        raise ConfigError(f"there is no tracker {name!r}: {nearest(name, PACKAGES)}")
    module, package = PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"the tracker {name} is not installed: pip install {package}")


def samples_of(rollout: Rollout, tokenizer: Any) -> list[list[Any]]:
    """Return rows of `COLUMNS`; a row without a score has `None`."""
    episodes = HostRollout.read(rollout, {})
    scored = rollout.scored.tolist()
    rows = []
    for row, (prompt, response) in enumerate(zip(episodes.prompts, episodes.responses, strict=True)):
        texts = [tokenizer.decode(prompt), decode_continuation(tokenizer, prompt, response)]
        rows.append([*texts, episodes.outcomes["score"][row] if scored[row] else None])
    return rows


def tracker_of(name: str, folder: Path | None) -> Any:
    """Return accelerate's tracker of this name, not started yet."""
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    run = "run" if folder is None else folder.name
    if name == "tensorboard":
        return kind(name, logging_dir=str(Path("runs") if folder is None else folder / "trackers"))
    if name == "aim":
        return kind(run, logging_dir=str(Path("runs") if folder is None else folder.parent), experiment=PROJECT)
    if name == "mlflow":
        return kind(PROJECT, run_name=run)
    if name in ("wandb", "trackio"):
        return kind(os.environ.get(f"{name.upper()}_PROJECT", PROJECT), name=run)
    return kind(PROJECT)


def allowed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values under names that a tracker takes; MLflow refuses some characters, as in `rewards/<lambda>/mean`."""
    if name != "mlflow":
        return dict(values)
    return {re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII): value for key, value in values.items()}


def log_samples(name: str, tracker: Any, rows: Sequence[Sequence[Any]], step: int) -> None:
    """Send a table of samples, in the form that a tracker has for tables, or as text."""
    if name in ("wandb", "clearml"):
        tracker.log_table("samples", columns=list(COLUMNS), data=[list(row) for row in rows], step=step)
    elif name == "mlflow":
        import mlflow

        table = {column: [row[place] for row in rows] for place, column in enumerate(COLUMNS)}
        mlflow.log_table({"step": [step] * len(rows), **table}, "samples.json")  # appends
    elif name == "trackio":
        import pandas
        import trackio

        tracker.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(COLUMNS)))}, step=step)
    elif name == "tensorboard":
        tracker.log({"samples": markdown(rows)}, step=step)
    elif name == "aim":
        import aim

        tracker.tracker.track(aim.Text(markdown(rows)), name="samples", step=step)
    elif name == "comet_ml":
        tracker.tracker.log_text(markdown(rows), step=step)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows of `COLUMNS` as a table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([markdown_cell(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as numbers and strings by name, which is what all trackers take.

    >>> flat({"agent": "ppo", "config": {"lam": 0.9, "constraints": {}}, "kl_bounds": (1.0, 2.0)})
    {'agent': 'ppo', 'config/lam': 0.9, 'kl_bounds': '[1.0, 2.0]'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{name}"] = value
        else:
            found[f"{prefix}{name}"] = str(value) if value is None or isinstance(value, Path) else json.dumps(value)
    return found
