"""Held-out prompts: which rows are kept from training, and how good a policy is on them during and after training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from rich.table import Table

from textgym.data.overlap import key_of_prompt
from textgym.data.rows import Row
from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.rewards.intervals import Interval, bootstrap
from textgym.settings import Count, check_arguments

from ..common.rollout_agent import Metrics, RolloutAgent
from .evaluation import Judge, Samples, distinct_2, generate
from .run_folder import RunFolder, figures_table

SHARE = 10
"""At most one prompt in ten is held out."""


def hold_out(rows: Sequence[Row], number: int) -> tuple[list[Row], list[Row]]:
    """Split prompts into those to train on and about `number` to measure on, at most a tenth.

    Prompts that differ only in case, punctuation and white space stay together. Which ones are held out depends on the
    prompts alone, so that a resumed run holds out the same.

    Returns:
        Both lists, in the order of `rows`; the second is empty if there are fewer than ten different prompts.
    """
    keys = [key_of_prompt(row["prompt"]) for row in rows]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode(errors="surrogatepass")).digest())
    chosen = set(order[: min(number, len(order) // SHARE)])
    train = [row for row, key in zip(rows, keys, strict=True) if key not in chosen]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in chosen][:number]


def heldout_envs(envs: Any, number: int) -> Any:
    """Keep some prompts from training, and return another environment to measure a policy in.

    It has the prompts that are kept, or all of them if there are too few, and in games. Reward functions and reference
    are the same objects, since they may be large.

    Args:
        envs: The `TextVectorEnv` to train in, from `gym.make_vec`; it loses these prompts.
        number: How many prompts to keep, at most a tenth of them.
    """
    base, spec = envs.unwrapped, envs.spec
    arguments = {name: value for name, value in spec.kwargs.items() if name not in ("num_envs", "vectorization_mode")}
    if base.takes_whole_responses:
        train, heldout = hold_out(base.prompts, number)
        base.replace_prompts(train)
        arguments |= {"reward": base.scorer.functions, "reward_weights": base.scorer.weights}
        arguments |= {"reference": base.reference, "prompts": heldout or train}
    return gym.make_vec(spec.id, base.num_envs, **arguments)


class HeldOut:
    """Callback of agents that measures the policy on held-out prompts, at the start and every few updates.

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

    def __call__(self, agent: RolloutAgent, metrics: Metrics) -> None:
        """Measure the policy if it is time; agents call this after each update."""
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
        samples = self.samples(policy)
        means = {name: float(np.nanmean(values)) for name, values in figures(samples, self.reference).items()}
        return {**means, "distinct_2": distinct_2(samples.rollout)}

    def before_and_after(
        self, start: ActorCritic, policy: ActorCritic, folder: RunFolder, judge: Judge | None = None
    ) -> Table:
        """Write completions of a policy and of its start, and their figures; return a table of the figures."""
        before, after = self.samples(start), self.samples(policy)
        texts = [transcript["prompt"] for transcript in before.transcripts]
        folder.write_samples({"before": before.completions, "after": after.completions}, texts)
        columns = comparison(before, after, self.reference, judge)
        folder.write_json("evaluation.json", {"prompts": len(texts), **columns})
        title = f"{len(texts)} completions of {len(set(texts))} prompts; differences with 95% intervals over prompts"
        return figures_table(title, columns)


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


def comparison(
    before: Samples, after: Samples, reference: TokenModel, judge: Judge | None = None
) -> dict[str, dict[str, float | str]]:
    """Return the columns "before", "after" and "difference" of a table of figures.

    A difference has its 95% confidence interval, by the paired bootstrap over prompts. Rows that only one of both has a
    score for are left out of the scores.
    """
    old, new = figures(before, reference, judge), figures(after, reference, judge)
    columns: dict[str, dict[str, float | str]] = {"before": {}, "after": {}, "difference": {}}
    for name in old:
        known = ~(np.isnan(old[name]) | np.isnan(new[name]))
        if not known.any():
            continue
        difference = _paired(old[name][known], new[name][known], _prompts(before, known))
        columns["before"][name] = float(old[name][known].mean())
        columns["after"][name] = float(new[name][known].mean())
        columns["difference"][name] = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    columns["before"]["distinct_2"] = distinct_2(before.rollout)
    columns["after"]["distinct_2"] = distinct_2(after.rollout)
    return columns


def _paired(old: np.ndarray, new: np.ndarray, prompts: Sequence[str]) -> Interval:
    differences = new - old
    return bootstrap(lambda rows: float(differences[rows].mean()), prompts)


def _prompts(samples: Samples, known: np.ndarray) -> list[str]:
    rows: Sequence[Mapping[str, Any]] = samples.transcripts
    return [repr(row["prompt"]) for row, kept in zip(rows, known, strict=True) if kept]
