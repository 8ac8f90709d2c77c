"""WarningSigns: says once of each sign that a run goes wrong, with its figures and what to do about it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from textgym.rewards.kl import AdaptiveKL, ThresholdKL

from ...common.means import ROUNDING
from ...common.rollout_agent import Metrics, RolloutAgent
from ...objectives.critic_agent import EXPLAINED, WITHIN_PROMPTS

FIRST = 3
"""Updates at the start of a run that later ones are compared with."""
LAST = 5
"""Updates over which a figure is averaged, so that a single odd rollout does not cause a warning."""
CRITIC_UPDATES = 10
"""Updates that a critic has to learn something. Those whose prompts all differ do not report what it explains within
prompts, so at least `LAST` of them must."""

MOST_KL = 1.2
"""Share of the KL budget."""
MOST_CLIPPED = 0.5
LEAST_ENTROPY = 0.3
"""Share of the entropy at the start."""
MOST_EQUAL_GROUPS = 0.5
MOST_CUT = 0.8
MOST_UNSCORED = 0.1
MOST_DRIFT = 0.3
"""Share of the length at the start."""


class TrainingWarning(UserWarning):
    """A run goes wrong, and the warning says how and what to do."""


class WarningSigns:
    """Callback of agents that learn from rollouts: warns once of each sign, after the update that shows it.

    `agent.learn(4096, callback=[WarningSigns(agent)])` has its warnings without a progress display.

    Args:
        agent: The agent, whose KL penalty and stop tokens matter.
        say: Called with each warning; by default it is a `TrainingWarning` of Python's.
        history: Metrics of earlier updates of a resumed run, whose signs are not said again.
    """

    def __init__(
        self, agent: RolloutAgent, say: Callable[[str], object] | None = None, history: Iterable[Metrics] = ()
    ) -> None:
        self.budget = kl_budget(agent)
        env = agent.base_env
        self.can_stop = bool(env.stop.ids) and env.stop.min_new_tokens < env.max_new_tokens
        self.say = say if say is not None else python_warning
        self.history: deque[Metrics] = deque(maxlen=CRITIC_UPDATES)
        self.first: list[Metrics] = []
        self.said: set[str] = set()
        for metrics in history:
            self.said |= self._signs(metrics).keys()

    def __call__(self, agent: Any, metrics: Metrics) -> None:
        """Look at the metrics of an update."""
        for name, text in self._signs(metrics).items():
            if name not in self.said:
                self.said.add(name)
                self.say(text)

    def _signs(self, metrics: Metrics) -> dict[str, str]:
        """Return the signs that there are after an update, by name; each with its figures and the remedy."""
        self.history.append(metrics)
        if len(self.first) < FIRST:
            self.first.append(metrics)
        found = {
            "critic": self._critic(),
            "kl": self._kl(),
            "clipping": self._clipping(metrics),
            "entropy": self._entropy(),
            "equal scores": self._equal(),
            "cut": self._cut(),
            "unscored": self._unscored(),
            "length": self._length(),
        }
        return {name: text for name, text in found.items() if text is not None}

    def _mean(self, name: str) -> float | None:
        """Return the mean of a metric over the last updates; `None` if there are too few that report it."""
        values = [row[name] for row in list(self.history)[-LAST:] if name in row]
        return fmean(values) if len(values) == LAST else None

    def _since_start(self, name: str) -> tuple[float, float] | None:
        """Return a metric at the start and now; `None` if there are too few updates that report it."""
        start, now = [row[name] for row in self.first if name in row], self._mean(name)
        return None if now is None or not start else (fmean(start), now)

    def _critic(self) -> str | None:
        """Look at what the critic explains within prompts, and at all it explains where prompts hardly repeat."""
        if len(self.history) < CRITIC_UPDATES:
            return None
        for name, where in ((WITHIN_PROMPTS, "within prompts"), (EXPLAINED, "of all returns")):
            values = [row[name] for row in self.history if name in row]
            if len(values) >= LAST and (share := fmean(values)) < 0:
                return (
                    f"the critic explains {share:.2f} of the variance {where}, a mean over {len(values)} updates: its "
                    "values add noise to the advantages. Use a separate critic (critic='separate') with a higher "
                    "critic_learning_rate, train it alone at first (freezing_actor_steps), or use an agent without a "
                    "critic (rloo, grpo)"
                )
        return None

    def _kl(self) -> str | None:
        kl = self._mean("objective/kl")
        if self.budget is None or kl is None or kl <= MOST_KL * self.budget:
            return None
        return (
            f"the KL to the reference is {kl:.1f} nats, above its budget of {self.budget:g}: samples may exploit the "
            "reward, so read some. Start with a larger kl_coef, lower the learning_rate, or raise the budget"
        )

    def _clipping(self, metrics: Metrics) -> str | None:
        clipped = metrics.get("policy/clipfrac_avg", 0.0)
        if clipped <= MOST_CLIPPED:
            return None
        return (
            f"{clipped:.0%} of the ratios were clipped in an update: the steps are too large, and most tokens have no "
            "gradient after the first ones. Lower the learning_rate or num_epochs, use larger minibatches, or end "
            "updates early by target_kl"
        )

    def _entropy(self) -> str | None:
        entropy = self._since_start("policy/entropy_avg")
        if entropy is None or entropy[1] >= LEAST_ENTROPY * entropy[0]:
            return None
        return (
            f"the entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats a token: the policy "
            "repeats the same texts, and explores no others. Raise kl_coef or entropy_coef, lower the learning_rate, "
            "and compare eval/distinct_2 of the beginning and now"
        )

    def _equal(self) -> str | None:
        share = self._mean("val/equal_scores")
        if share is None:
            return self._all_equal()
        if share <= MOST_EQUAL_GROUPS:
            return None
        return (
            f"in {share:.0%} of the groups all rows have the same score, so there is nothing to learn from them. Use "
            "prompts that the policy solves sometimes, a larger group_size, a higher temperature, a reward with more "
            "values, or dynamic_sampling of GRPO"
        )

    def _all_equal(self) -> str | None:
        """Look at all rows of an agent that does not compare groups."""
        spread, score = self._mean("objective/scores_std"), self._mean("objective/scores")
        if spread is None or score is None or spread > ROUNDING * abs(score):
            return None
        return (
            f"all rows have the same score, {score:.3g}, so there is nothing to learn from them. Check what the reward "
            "functions return, and use prompts that the policy solves sometimes or a reward with more values"
        )

    def _cut(self) -> str | None:
        stopped = self._mean("val/ended_by_stop")
        if not self.can_stop or stopped is None or 1 - stopped <= MOST_CUT:
            return None
        return (
            f"{1 - stopped:.0%} of the rows are cut by the length limit, and their texts are scored unfinished. Raise "
            "max_new_tokens, check that the policy knows the stop tokens, or charge unfinished texts by "
            "missing_eos_penalty"
        )

    def _unscored(self) -> str | None:
        share = self._mean("objective/unscored")
        if share is None or share <= MOST_UNSCORED:
            return None
        return (
            f"{share:.0%} of the rows have no score and are not trained on: their reward functions returned None or "
            "failed. Look at rewards/<name>/errors and at the rows that the functions refuse"
        )

    def _length(self) -> str | None:
        length = self._since_start("val/response_tokens")
        if length is None or abs(length[1] - length[0]) <= MOST_DRIFT * length[0]:
            return None
        return (
            f"responses went from {length[0]:.1f} to {length[1]:.1f} tokens: unless the reward asks for it, the policy "
            "found that it pays. Check how the score depends on the length, use gamma=1, a larger kl_coef, or an "
            "overlong penalty"
        )


def kl_budget(agent: RolloutAgent) -> float | None:
    """Return the nats an episode that the KL penalty is steered to; `None` for a fixed coefficient."""
    controller = agent.penalty.controller
    if isinstance(controller, AdaptiveKL):
        return controller.target
    return controller.high if isinstance(controller, ThresholdKL) else None


def python_warning(text: str) -> None:
    """Warn of a text as Python does, with a `TrainingWarning`."""
    warnings.warn(text, TrainingWarning, stacklevel=2)
