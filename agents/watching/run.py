"""WatchedRun: what a run shows and keeps while its agent learns; `textgym train` and `learn(folder=...)` alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.table import Table

from textgym.errors import ConfigError

from ..callbacks import Callback, CallbackLike, CallbackList, Metrics
from ..common.rollout_agent import RolloutAgent
from ..common.supervised import SupervisedAgent
from ..machine.distributed import everyone
from ..runs.checkpoints import Checkpoints
from ..runs.display.overview import overview
from ..runs.display.warning_signs import WarningSigns, kl_budget
from ..runs.evaluation import Judge
from ..runs.heldout import HeldOut
from ..runs.interrupts import Interrupts
from ..runs.profiling import Profiler
from ..runs.progress import LiveProgress
from ..runs.records import Recorder
from ..runs.run_folder import FiguresTable, RunFolder
from .trackers import Trackers


class WatchedRun:
    """Shows and keeps a run: overview, progress, warnings, metrics, evaluation, records, checkpoints, curves, policy.

    Of several processes the first one has all of these, and the others the checkpoints alone, in which they take part.

    Args:
        agent: The agent.
        live: Where it is shown.
        total_episodes: Episodes of the whole run; SFT and DPO do not play any.
        folder: The run folder; `None` keeps nothing.
        heldout: Evaluation on held-out prompts; `None` for none.
        checkpoints: Where checkpoints are written; `None` for none.
        record_every: Updates between records of tokens in the folder; 0 for none.
        judge: Scores the recorded rows; the policy is not trained on it.
        profiler: What measures the first updates.
        trackers: Trackers that get metrics, samples and settings too.
        at_the_end: Called after the last update; returns a table that is shown. If it is a `FiguresTable`, trackers get
            its figures.
        warn: Called with each warning of how the run goes; by default it is shown where the run is.
    """

    def __init__(
        self,
        agent: RolloutAgent | SupervisedAgent,
        live: LiveProgress,
        *,
        total_episodes: int = 0,
        folder: RunFolder | None = None,
        heldout: HeldOut | None = None,
        checkpoints: Checkpoints | None = None,
        record_every: int = 0,
        judge: Judge | None = None,
        profiler: Profiler | None = None,
        trackers: Trackers | None = None,
        at_the_end: Callable[[], Table | None] | None = None,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        self.agent, self.live, self.total_episodes = agent, live, total_episodes
        self.folder, self.heldout, self.checkpoints = folder, heldout, checkpoints
        self.record_every, self.judge, self.profiler, self.trackers = record_every, judge, profiler, trackers
        self.at_the_end = at_the_end
        self.warn = warn if warn is not None else lambda text: live.say(f"warning: {text}")
        self.interrupts = Interrupts(live.console)

    @contextmanager
    def learning(self, callback: CallbackLike = None, resumed: bool = False) -> Iterator[CallbackList]:
        """Yield the callbacks of `learn`, and keep what was learned whatever ends it.

        Args:
            callback: Further callbacks.
            resumed: Whether the agent continues from a checkpoint, which is then not written again.
        """
        agent, live = self.agent, self.live
        self._say_overview()
        table = None
        try:
            # Without checkpoints there is nothing that an interrupt should wait for.
            with live, nullcontext() if self.checkpoints is None else self.interrupts:
                total = self.total_episodes if isinstance(agent, RolloutAgent) else agent.total_updates
                live.stage(type(agent).__name__, total)
                if self.checkpoints is not None and not resumed:
                    self.checkpoints.save(agent)
                yield CallbackList([*self._callbacks(CallbackList(callback).callbacks), self.interrupts])
                stopped = any(everyone(self.interrupts.received is not None))
                if self.checkpoints is not None:
                    self.checkpoints.finish(agent)
                if not stopped and self.at_the_end is not None:
                    live.stage("writing samples")
                    table = self.at_the_end()
                    if self.trackers is not None and isinstance(table, FiguresTable):
                        self.trackers.send_figures(table.figures)
                live.finish()
            if self.folder is not None and not stopped:
                self.folder.claim.finish()
            if table is not None:
                live.say(table, always=True)
            if self.profiler is not None and self.profiler.profile is not None:
                live.console.print(*self.profiler.profile.tables(), sep="\n")
        finally:  # also after Ctrl-C: what was learned is kept
            self._close()

    def _callbacks(self, given: Sequence[Callback]) -> list[Any]:
        """Return the run's own callbacks around the given ones.

        The given ones read the evaluation, and may add metrics, so they come after it and before what keeps metrics.
        Metrics and records come before the checkpoint that goes on after them.
        """
        agent = self.agent
        found: list[Any] = [self.heldout]
        if isinstance(agent, RolloutAgent) and self.folder is not None and self.record_every:
            found.append(Recorder(self.folder.folder, agent, self.record_every, judge=self.judge))
        found += [*given, plain_numbers, self.folder, self.trackers, self.checkpoints, self.live, self.profiler]
        if isinstance(agent, RolloutAgent):
            history = [] if self.folder is None else self.folder.history
            found.append(WarningSigns(agent, self._warn, history))
        return [callback for callback in found if callback is not None]

    def _warn(self, text: str) -> None:
        """Show a warning, and keep it in the run folder, too."""
        if self.folder is not None:
            self.folder.keep_warning(self.agent.updates, text)
        self.warn(text)

    def _say_overview(self) -> None:
        shown = overview(self.agent, self.total_episodes)
        if self.folder is not None:
            shown["folder"] = str(self.folder.folder)
        for title, text in shown.items():
            self.live.say(f"{title + ':':<12} {text}")

    def _close(self) -> None:
        if self.profiler is not None:
            self.profiler.close()
        if self.trackers is not None:
            self.trackers.close()
        if self.folder is None:
            return
        agent, folder = self.agent, self.folder
        tokenizer = agent.base_env.tokenizer if isinstance(agent, RolloutAgent) else agent.tokenizer
        agent.policy.save_pretrained(folder.folder / "policy", tokenizer, overwrite=True)
        folder.draw_curves(kl_budget(agent) if isinstance(agent, RolloutAgent) else None)
        folder.close()
        self.live.say(f"run folder: {folder.folder}", always=True)


def plain_numbers(agent: Any, metrics: Metrics) -> None:
    """Callback that makes plain numbers, as JSON has them, of metrics that other callbacks added, such as tensors.

    Raises:
        ConfigError: If one is not a number.
    """
    for name, value in metrics.items():
        if type(value) in (int, float):
            continue
        try:
            metrics[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a callback set the metric {name!r} to {value!r}: a metric is a number") from error
