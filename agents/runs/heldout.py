"""Held-out prompts: which rows are kept from training, and how good a policy is on them during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.rewards.functions import lexicon_sentiment
from textgym.rewards.intervals import Interval, bootstrap, jackknife
from textgym.settings import Count, check_arguments

from ..common.rollout_agent import Metrics, RolloutAgent
from .evaluation import Judge, Samples, bigrams, distinct, generate
from .run_folder import FiguresTable, RunFolder, figures_table, note


def judge_of(env: str) -> Judge | None:
    """Return a second judge of the texts of an environment, in addition to its reward; `None` if there is none.

    The texts of `textgym/Sentiment-v0` are judged by a lexicon of sentiment, if the package that has it is installed.
    """
    if env != "textgym/Sentiment-v0":
        return None
    if find_spec("vaderSentiment") is None:
        note("vaderSentiment is not installed, so no lexicon judges the texts: pip install 'textgym[metrics]'")
        return None
    return lexicon_sentiment


class HeldOut:
    """Callback of agents that measures the policy on held-out prompts every few updates, and after the last one.

    It adds `eval/score`, `eval/kl`, `eval/length`, `eval/distinct_2` and `eval/ended_by_stop` to the metrics of an
    update, so it comes before the callbacks that write or show them. Training is not affected: the environment is
    another one, and the policy's random generator is put back.

    Args:
        envs: A `TextVectorEnv` with the held-out prompts, or with those of training.
        reference: Reference of the KL.
        every: Number of updates between evaluations.
        seed: Seed of the sampling, the same each time.
        samples: How many completions to measure: of the first prompts, or several of each if there are fewer prompts.

    Raises:
        ConfigError: If `every` is below 1.
    """

    @check_arguments
    def __init__(self, envs: Any, reference: TokenModel, every: Count = 10, seed: int = 0, samples: Count = 64) -> None:
        self.envs, self.reference, self.every, self.seed = envs, reference, every, seed
        number = len(envs.unwrapped.prompts)
        self.prompts = [sample % number for sample in range(samples)]
        self.last: tuple[list[Any], Answers] | None = None  # the policy after this update, and what it answered

    def __call__(self, agent: RolloutAgent, metrics: Metrics) -> None:
        """Measure the policy if it is time; agents call this after each update."""
        self.last = None
        if agent.updates % self.every == 0 or agent.episodes >= agent.total_episodes:
            metrics |= {f"eval/{name}": value for name, value in self.measure(agent.policy).items()}

    def samples(self, policy: ActorCritic) -> Samples:
        """Return completions of the held-out prompts."""
        generator = policy.generator
        try:
            return generate(policy, self.envs, self.prompts, self.seed)  # with a generator of its own
        finally:
            policy.generator = generator

    def measure(self, policy: ActorCritic) -> dict[str, float]:
        """Return the means over completions of the held-out prompts."""
        answers = Answers.of(self.samples(policy), self.reference)
        self.last = _state(policy), answers
        means = {name: float(np.nanmean(values)) for name, values in answers.rows().items()}
        return {**means, "distinct_2": distinct(answers.token_pairs())}

    def answers(self, policy: ActorCritic) -> Answers:
        """Return completions of the held-out prompts with their figures, as plain values.

        A policy that was measured after this update and has not changed since does not write them again.
        """
        if self.last is not None and self.last[0] == _state(policy):
            return self.last[1]
        return Answers.of(self.samples(policy), self.reference)


def _state(policy: ActorCritic) -> list[Any]:
    """Return what differs if a policy is another one, or was changed in place."""
    return [policy, policy.temperature, policy.rules, *(weight._version for weight in policy.parameters())]


def figures(samples: Samples, reference: TokenModel, judge: Judge | None = None) -> dict[str, np.ndarray]:
    """Return score, KL (nats), length (tokens), end by a stop token, and judge of each sample, `(N,)`.

    A sample without a score is NaN in `score`.
    """
    rollout = samples.rollout
    log_probs = reference.sequence_log_probs(rollout.sequences.to(reference.device)).to(rollout.log_probs.device)
    found = {
        "score": rollout.raw_scores.masked_fill(~rollout.scored, float("nan")),
        "kl": (rollout.log_probs - log_probs).sum(1),
        "length": rollout.sequences.response_lengths,
        "ended_by_stop": rollout.ended_by_stop,
    }
    rows = {name: values.double().cpu().numpy() for name, values in found.items()}
    if judge is not None:
        rows["judge"] = np.array(judge([row["prompt"] for row in samples.transcripts], samples.completions))
    return rows


@dataclass(frozen=True)
class Answers:
    """What a policy wrote to held-out prompts, as plain values: a run folder keeps those of the start of its run.

    Attributes:
        prompts: The prompt of each row.
        completions: Its completion.
        figures: `figures` of the rows; `None` where one is not known.
        bigrams: `bigrams` of the rows.
    """

    prompts: list[str]
    completions: list[str]
    figures: dict[str, list[float | None]]
    bigrams: list[list[int]]

    @classmethod
    def of(cls, samples: Samples, reference: TokenModel) -> Answers:
        """Return the answers of samples."""
        rows = {
            name: [None if np.isnan(value) else float(value) for value in values]
            for name, values in figures(samples, reference).items()
        }
        prompts = [str(transcript["prompt"]) for transcript in samples.transcripts]
        return cls(prompts, samples.completions, rows, [row.tolist() for row in bigrams(samples.rollout)])

    def token_pairs(self) -> list[np.ndarray]:
        """Return the bigrams of the rows as arrays."""
        return [np.array(row, dtype=np.int64) for row in self.bigrams]

    def rows(self, judge: Judge | None = None) -> dict[str, np.ndarray]:
        """Return the figures of the rows, and what a judge says of them; NaN where one is not known."""
        rows = {name: np.array(values, dtype=np.float64) for name, values in self.figures.items()}
        if judge is not None:
            rows["judge"] = np.array(judge(self.prompts, self.completions))
        return rows


def before_and_after(
    before: Answers, after: Answers, folder: RunFolder | None = None, judge: Judge | None = None
) -> FiguresTable:
    """Return a table of the figures of a policy and of its start; write them into a run folder.

    Args:
        before: `HeldOut.answers` of the policy at the start of training.
        after: Those of the policy, to the same prompts.
        folder: Run folder for completions and figures; `None` to write nothing.
        judge: A scoring function that the policy was not trained with.
    """
    texts, columns = before.prompts, compared(before, after, judge)
    if folder is not None:
        folder.write_samples({"before": before.completions, "after": after.completions}, texts)
        folder.write_json("evaluation.json", {"prompts": len(texts), **columns})
    title = f"{len(texts)} completions of {len(set(texts))} prompts; differences with 95% intervals over prompts"
    return figures_table(title, columns)


def comparison(
    before: Samples, after: Samples, reference: TokenModel, judge: Judge | None = None
) -> dict[str, dict[str, float | str]]:
    """Return the columns "before", "after" and "difference" of a table of figures.

    A difference has its 95% confidence interval, by the paired bootstrap over prompts; that of the share of distinct
    bigrams is by the jackknife. Rows that only one of both has a score for are left out of the scores.
    """
    return compared(Answers.of(before, reference), Answers.of(after, reference), judge)


def compared(before: Answers, after: Answers, judge: Judge | None = None) -> dict[str, dict[str, float | str]]:
    """Return the columns of `comparison` for answers to the same prompts."""
    old, new = before.rows(judge), after.rows(judge)
    columns: dict[str, dict[str, float | str]] = {"before": {}, "after": {}, "difference": {}}
    for name in old:
        known = ~(np.isnan(old[name]) | np.isnan(new[name]))
        if not known.any():
            continue
        prompts = [prompt for prompt, kept in zip(before.prompts, known, strict=True) if kept]
        difference = _paired(old[name][known], new[name][known], prompts)
        columns["before"][name] = float(old[name][known].mean())
        columns["after"][name] = float(new[name][known].mean())
        columns["difference"][name] = _signed(difference)
    first, last = before.token_pairs(), after.token_pairs()
    columns["before"]["distinct_2"], columns["after"]["distinct_2"] = distinct(first), distinct(last)

    def gain(rows: np.ndarray) -> float:
        return distinct([last[row] for row in rows]) - distinct([first[row] for row in rows])

    columns["difference"]["distinct_2"] = _signed(jackknife(gain, before.prompts))
    return columns


def _signed(difference: Interval) -> str:
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _paired(old: np.ndarray, new: np.ndarray, prompts: Sequence[str]) -> Interval:
    differences = new - old
    return bootstrap(lambda rows: float(differences[rows].mean()), prompts)
