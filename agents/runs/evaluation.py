"""Generate completions with a policy and evaluate them: score, KL, judge, perplexity, diversity and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from textgym.envs.interface import rollout_env
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding.beam_search import beam_search
from textgym.models.machine.transfer import to_host
from textgym.models.token_model import TokenModel
from textgym.rewards.engine.completions_to_score import Finished, RewardError
from textgym.rewards.engine.scoring import RewardSpec, Scorer
from textgym.rewards.functions.overlap import CorpusMetric
from textgym.rewards.intervals import Interval, Statistic, bootstrap
from textgym.settings import Count, check_arguments

from ..common.rollout import Rollout, collect, merge, score_whole

Judge = Callable[[list[str], list[str]], list[float]]


@dataclass(frozen=True)
class Samples:
    """One completion for each of N prompts.

    Attributes:
        transcripts: Prompt, completion and the columns of each row.
        rollout: The same rows as tensors.
        finished: The same rows as arguments of reward functions.
        tokenizer: The policy's tokenizer.
    """

    transcripts: list[dict[str, Any]]
    rollout: Rollout
    finished: list[Finished]
    tokenizer: Any

    @property
    def completions(self) -> list[str]:
        """The completions as text."""
        return [transcript["completion"] for transcript in self.transcripts]


@check_arguments
def generate(
    policy: ActorCritic,
    envs: Any,
    prompts: Sequence[int],
    seed: int,
    deterministic: bool = False,
    num_beams: Count = 1,
) -> Samples:
    """Generate completions of some of an environment's prompts.

    Args:
        policy: The policy; its random generator is seeded again.
        envs: A `TextVectorEnv`; it has to be reset before it is stepped again.
        prompts: Indices into the environment's prompts.
        seed: Seed of the sampling.
        deterministic: Whether to choose the most likely token at every step instead of sampling.
        num_beams: Number of beams of a beam search, which replaces the sampling; 1 for none.

    Raises:
        ValueError: If there are no prompts.
        ConfigError: If `num_beams` is above 1 in an environment of several turns, or with an action mask or stop
            strings, or if the policy samples with `min_p`.
    """
    if len(prompts) == 0:
        raise ValueError("there are no prompts to complete: choose at least one")
    base_env = rollout_env(envs)
    base_env.fit(policy)
    policy.seed(seed)
    rollouts, transcripts, finished = [], [], []
    training_state = base_env.scorer.state()  # evaluation must not change the running scale of training
    for start in range(0, len(prompts), envs.num_envs):
        chosen = list(prompts[start : start + envs.num_envs])
        padded = chosen + chosen[-1:] * (envs.num_envs - len(chosen))  # every row needs a prompt
        options = {"prompt_index": padded}
        if num_beams > 1:
            rollout = _beams(envs, policy, options, num_beams)
        else:
            rollout = collect(envs, policy, options, deterministic)
        rollouts.append(rollout[: len(chosen)])
        transcripts += [dict(transcript) for transcript in base_env.transcript[: len(chosen)]]
        finished += [base_env.finished(np.array([row])) for row in range(len(chosen))]
    base_env.scorer.load_state(training_state)
    return Samples(transcripts, merge(rollouts), finished, base_env.tokenizer)


def _beams(envs: Any, policy: ActorCritic, options: dict[str, Any], num_beams: int) -> Rollout:
    """Return the responses of a beam search to the prompts of a reset; their log-probs are those of the policy."""
    base_env = rollout_env(envs)
    wrapped = envs is not base_env
    with base_env.whole_episodes():
        if wrapped or not base_env.takes_whole_responses:
            raise ConfigError(
                f"num_beams={num_beams} needs an environment without wrappers, stop strings, action_mask and replies: "
                "use num_beams=1"
            )
        observation, _ = envs.reset(options=options)
        prompts, lengths = observation["input_ids"], observation["attention_mask"].sum(1)
        found = beam_search(policy, prompts, lengths, base_env.max_new_tokens, base_env.stop, num_beams)
        return score_whole(envs, policy, *found)


def measure(
    samples: Samples, reference: TokenModel, judge: Judge | None = None, metrics: Sequence[RewardSpec] = ()
) -> dict[str, float]:
    """Return metrics of samples.

    Args:
        samples: Samples from `generate`. Scores are in the units of the reward functions, before any scaling.
        reference: Reference of KL and perplexity.
        judge: Function from prompts and completions to scores; one that the policy was not trained with.
        metrics: Other reward functions to use as metrics; see `score_samples`.

    Returns:
        `score` and `score_std` (mean and standard deviation over the samples that have a score); `kl` (nats per
        sequence, mean of k1); `judge`; `reference_ppl` (perplexity of the completions under the reference);
        `distinct_2` (share of distinct bigrams); `length` (tokens); `ended_by_stop` (share); and each of `metrics` by
        its name.

    Raises:
        RewardError: If no sample has a score.
    """
    rollout, mask = samples.rollout, samples.rollout.response_mask
    scores = rollout.raw_scores[rollout.scored]
    if len(scores) == 0:
        raise RewardError("none of the samples has a score: the reward functions returned None for all of them")
    reference_log_probs = reference.sequence_log_probs(rollout.sequences.to(reference.device)).to(mask.device)
    results: dict[str, Any] = {
        "score": scores.mean(),
        "score_std": scores.std(correction=0),
        "kl": (rollout.log_probs - reference_log_probs).sum(1).mean(),
        "reference_ppl": (-reference_log_probs.sum() / mask.sum()).exp(),
        "distinct_2": distinct_2(rollout),
        "length": rollout.sequences.response_lengths.float().mean(),
        "ended_by_stop": rollout.ended_by_stop.float().mean(),
    }
    if judge is not None:
        prompts = [transcript["prompt"] for transcript in samples.transcripts]
        results["judge"] = np.mean(judge(prompts, samples.completions))
    if metrics:
        results |= score_samples(samples, metrics)
    return {name: float(value) for name, value in results.items()}


def score_samples(samples: Samples, metrics: Sequence[RewardSpec]) -> dict[str, float]:
    """Return the mean of each reward function over the samples; of `Bleu`, `Chrf` and `Ter` the corpus score.

    Samples for which a function returned `None` are left out of its value.

    Raises:
        RewardError: If a function returned `None` for all samples.
    """
    return {name: metric.value(metric.scored) for name, metric in _metrics_of(samples, metrics).items()}


def score_intervals(
    samples: Samples, metrics: Sequence[RewardSpec], resamples: int = 200, seed: int = 0
) -> dict[str, Interval]:
    """Return the metrics of `score_samples` with 95% confidence intervals, by the percentile bootstrap over prompts.

    Prompts are resampled, and all samples of a prompt come with it; see `textgym.rewards.intervals.bootstrap`. A prompt
    is left out of a metric that scores none of its samples.

    Args:
        samples: Samples from `generate`.
        metrics: Reward functions.
        resamples: Number of bootstrap samples of the prompts.
        seed: Seed of the bootstrap.

    Raises:
        RewardError: If a function returned `None` for all samples.
    """
    scores = _metrics_of(samples, metrics)
    return {name: _interval(metric.value, samples, metric.scored, resamples, seed) for name, metric in scores.items()}


def score_gains(
    before: Samples, after: Samples, metrics: Sequence[RewardSpec], resamples: int = 200, seed: int = 0
) -> dict[str, Interval]:
    """Return the differences of metrics, after minus before, with 95% confidence intervals by the paired bootstrap.

    Both samples use the same prompts in each bootstrap sample, so the difficulty of prompts cancels. An interval above
    0 is an improvement. A row that only one of the two has a value for is left out.

    Args:
        before: Samples from `generate`.
        after: Samples of the same prompts in the same order.
        metrics: Reward functions.
        resamples: Number of bootstrap samples of the prompts.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the prompts differ.
        RewardError: If a function has a value for no row of both.
    """
    if [row.prompts for row in before.finished] != [row.prompts for row in after.finished]:
        raise ValueError("a paired comparison needs samples of the same prompts: pass the same indices to `generate`")
    old, new = _metrics_of(before, metrics), _metrics_of(after, metrics)

    def gain(name: str, rows: np.ndarray) -> float:
        return new[name].value(rows) - old[name].value(rows)

    gains = {}
    for name in old:
        rows = np.intersect1d(old[name].scored, new[name].scored)
        _check_scored(name, rows, len(before.finished))
        gains[name] = _interval(partial(gain, name), before, rows, resamples, seed)
    return gains


def _interval(value: Statistic, samples: Samples, rows: np.ndarray, resamples: int, seed: int) -> Interval:
    """Return the interval of a metric over some rows."""
    prompts = [repr(samples.finished[row].prompts[0]) for row in rows]  # `repr`, because a conversation has no hash
    return bootstrap(lambda chosen: value(rows[chosen]), prompts, resamples, seed)


@dataclass(frozen=True)
class _Metric:
    """A metric of samples that are scored already.

    Attributes:
        value: Function from rows to the value of the metric.
        scored: Indices of the rows that it has a value for.
    """

    value: Statistic
    scored: np.ndarray


def _metrics_of(samples: Samples, metrics: Sequence[RewardSpec]) -> dict[str, _Metric]:
    """Return the metrics by name; all rows are scored only once."""
    rows = samples.finished
    finished = Finished(
        [text for row in rows for text in row.prompts],
        [text for row in rows for text in row.completions],
        [ids for row in rows for ids in row.prompt_ids],
        [ids for row in rows for ids in row.completion_ids],
        {name: [value for row in rows for value in row.columns[name]] for name in rows[0].columns},
        [ids for row in rows for ids in row.text_ids or row.completion_ids],
    )
    scorer = Scorer(list(metrics), tokenizer=samples.tokenizer, device=samples.rollout.scores.device)
    components = scorer(finished).components
    completions, references = finished.completions, finished.columns.get("references", [])

    def mean(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(values[chosen].mean())

    def corpus(metric: CorpusMetric, chosen: np.ndarray) -> float:
        return metric.corpus([completions[row] for row in chosen], [references[row] for row in chosen])

    results = {}
    for name, function in zip(scorer.names, scorer.functions, strict=True):
        scored = np.flatnonzero(~np.isnan(components[name]))
        _check_scored(name, scored, len(rows))
        value = partial(corpus, function) if isinstance(function, CorpusMetric) else partial(mean, components[name])
        results[name] = _Metric(value, scored)
    return results


def _check_scored(name: str, scored: np.ndarray, count: int) -> None:
    if len(scored) == 0:
        raise RewardError(
            f"the metric {name!r} has no value for any of the {count} samples, because its function returned None for "
            "all of them, as it does for rows without a reference: leave it out, or give the prompts what it reads"
        )


def distinct_2(rollout: Rollout) -> float:
    """Return the share of distinct bigrams of generated tokens; compare it only between samples of the same size."""
    return distinct(bigrams(rollout))


def bigrams(rollout: Rollout) -> list[np.ndarray]:
    """Return the bigrams of each row's generated tokens, one number for each."""
    actions, counts = to_host(rollout.sequences.actions, rollout.response_mask.sum(1))
    rows = [tokens.numpy().astype(np.int64) for tokens in actions.split(counts.tolist())]
    return [(tokens[:-1] << 32) + tokens[1:] for tokens in rows]


def distinct(bigrams: Sequence[np.ndarray]) -> float:
    """Return the share of distinct ones among the bigrams of rows."""
    together = np.concatenate(bigrams)
    return len(np.unique(together)) / max(len(together), 1)
