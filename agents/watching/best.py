"""KeepBest and EarlyStop: the best checkpoint by a metric, and the end of a run that no longer gets better."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from textgym.data.files import atomic_file
from textgym.settings import Count, NotNegative, check_arguments

from ..callbacks import Callback, Metrics
from ..machine.distributed import everyone, rank

BEST = "best.json"


class _Judged(Callback):
    """Base class of callbacks that follow how good the policy is.

    Args:
        metric: Name of a metric. `None` for the objective on held-out prompts, `eval/score - beta eval/kl`, with the
            coefficient beta of the KL penalty at the start.
        mode: Whether a high or a low value is good.
    """

    def __init__(self, metric: str | None, mode: Literal["max", "min"]) -> None:
        self.metric, self.sign = metric, 1.0 if mode == "max" else -1.0
        self.beta: float | None = None
        self.best: float | None = None
        self.seen = False

    def on_training_start(self, agent: Any) -> None:
        """Note the coefficient of the KL penalty."""
        if self.metric is None and self.beta is None:
            self.beta = float(agent.penalty.coef)

    def value(self, metrics: Metrics) -> float | None:
        """Return the value of an update; `None` if it was not measured in this update."""
        if self.metric is not None:
            return metrics.get(self.metric)
        if "eval/score" not in metrics:
            return None
        return metrics["eval/score"] - (self.beta or 0.0) * metrics["eval/kl"]

    def is_better(self, metrics: Metrics, by: float = 0.0) -> bool | None:
        """Return whether an update is better than all before it; `None` if it was not measured. Processes agree."""
        value = everyone(self.value(metrics))[0]
        if value is None:
            return None
        self.seen = True
        better = self.best is None or self.sign * (value - self.best) > by
        if better:
            self.best = value
        return better

    def on_training_end(self, agent: Any) -> None:
        """Warn if the value was never measured."""
        if not self.seen:
            name = "eval/score" if self.metric is None else self.metric
            warnings.warn(
                f"{type(self).__name__} saw no update with the metric {name!r}: its name is wrong, or nothing measures "
                "it. learn(progress=True) and learn(folder=...) evaluate on held-out prompts",
                stacklevel=2,
            )


class KeepBest(_Judged):
    """Callback that keeps the checkpoint of the best update.

    >>> from textgym.agents import PPO
    >>> agent = PPO("tiny", "textgym/Sentiment-v0")
    >>> agent.learn(4096, KeepBest("runs/x/best"), folder="runs/x")  # doctest: +SKIP
    >>> best = PPO.load("runs/x/best/agent")  # doctest: +SKIP

    Args:
        folder: Folder of the checkpoint, `agent`, and of `best.json`, which has its value and its update. A resumed run
            replaces a checkpoint that is there only by a better one.
        metric: Name of a metric. `None` for the objective on held-out prompts, `eval/score - beta eval/kl`, with the
            coefficient beta of the KL penalty at the start.
        mode: Whether a high or a low value is good.
    """

    @check_arguments
    def __init__(self, folder: str | Path, metric: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        super().__init__(metric, mode)
        self.folder = Path(folder)

    def on_training_start(self, agent: Any) -> None:
        """Read the value of an earlier part of the run."""
        super().on_training_start(agent)
        if agent.updates and self.best is None and (self.folder / BEST).exists():
            self.best = float(json.loads((self.folder / BEST).read_text(encoding="utf-8"))["value"])

    def on_update_end(self, agent: Any, metrics: Metrics) -> None:
        """Save the agent if it is better than before."""
        if not self.is_better(metrics):
            return
        agent.save(self.folder / "agent", overwrite=True)
        if rank() == 0:
            name = "eval/score - beta eval/kl" if self.metric is None else self.metric
            best = {"metric": name, "value": self.best, "update": agent.updates}
            with atomic_file(self.folder / BEST) as temporary:
                temporary.write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")


class EarlyStop(_Judged):
    """Callback that ends a run that no longer gets better.

    Args:
        patience: Number of measurements in a row, without one that is better than all before, after which it ends.
        min_delta: By how much a measurement must be better.
        metric: As of `KeepBest`.
        mode: As of `KeepBest`.
    """

    @check_arguments
    def __init__(
        self,
        patience: Count = 5,
        min_delta: NotNegative = 0.0,
        metric: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        super().__init__(metric, mode)
        self.patience, self.min_delta, self.worse = patience, min_delta, 0

    def on_update_end(self, agent: Any, metrics: Metrics) -> bool:
        """Return `False` after `patience` measurements without progress."""
        better = self.is_better(metrics, self.min_delta)
        if better is not None:
            self.worse = 0 if better else self.worse + 1
        return self.worse < self.patience
