"""evaluate: what a policy writes and how good it is, beside its reference; `textgym evaluate` prints the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from rich.table import Table

from textgym.data.manifests import RUN
from textgym.envs.interface import rollout_env
from textgym.envs.tasks.base import TaskVectorEnv
from textgym.errors import ConfigError, RunFolderError
from textgym.models.actor_critic import ActorCritic, PolicyLike, as_policy
from textgym.models.fitting import tokenizer_of
from textgym.models.token_model import TokenModel
from textgym.rewards.engine.scoring import RewardSpec
from textgym.rewards.intervals import Interval
from textgym.settings import Count, WholeNumber, check_arguments

from ..machine.saved_files import make_environment
from .evaluation import Samples, generate, measure, score_intervals
from .heldout import judge_of
from .history import Run
from .run_folder import figures_table

Figures = dict[str, float | Interval]


@dataclass(frozen=True)
class Evaluation:
    """What policies write to the same prompts, and how good it is.

    Attributes:
        figures: The metrics of `measure` for "policy" and "reference"; a task's own metrics have 95% intervals.
        samples: Their completions.
    """

    figures: dict[str, Figures]
    samples: dict[str, Samples]

    def table(self) -> Table:
        """Return the figures as a table of rich, one column for each policy."""
        columns = {
            policy: {name: str(value) if isinstance(value, Interval) else value for name, value in figures.items()}
            for policy, figures in self.figures.items()
        }
        number = len(next(iter(self.samples.values())).transcripts)
        return figures_table(f"{number} prompts", columns)


@check_arguments
def evaluate(
    policy: PolicyLike,
    env: Any = None,
    *,
    reference: Any = None,
    against: PolicyLike | None = None,
    prompts: Count = 128,
    num_envs: Count = 64,
    metrics: Sequence[RewardSpec] = (),
    seed: WholeNumber = 0,
    num_beams: Count = 1,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Return what a policy and its reference write to the same prompts with the same seed, and how good it is.

    >>> from textgym.agents import evaluate
    >>> found = evaluate("tiny", "textgym/Sentiment-v0", prompts=8)
    >>> abs(found.figures["policy"]["kl"]) < 1e-4
    True
    >>> len(found.samples["policy"].completions)
    8

    Args:
        policy: A policy, a language model, a name or a folder of one; or the folder of a run, whose environment,
            reference and temperature are then those that it was trained with.
        env: Id of an environment, or a `TextVectorEnv`; of a run it may be left out. An environment that is given has
            to be reset before it is stepped again.
        reference: What KL and perplexity are measured to: a model or its name. `None` for that of the environment.
        against: Another policy, "other policy" of the figures.
        prompts: How many prompts, the environment's first ones.
        num_envs: Rows of an environment that is made of an id.
        metrics: Further reward functions to report.
        seed: Seed of the sampling.
        num_beams: Beams of a beam search, which replaces the sampling; 1 for none.
        env_kwargs: Further arguments of an environment that is made of an id.

    Raises:
        ConfigError: If there is no environment, or no reference.
        RunFolderError: If the folder of a run has no policy.
        UntrustedNameError: If a run names code of somebody else's; pass the environment yourself.
    """
    chosen = _loaded(policy)
    if isinstance(env, str | None):
        own = {**({} if reference is None else {"reference": _lm(reference)}), **(env_kwargs or {})}
        envs = _made_for(chosen, env, _run_of(policy), num_envs, own)
    elif env_kwargs:
        raise ConfigError("env_kwargs are of an environment that is made of an id, and env is one already")
    else:
        envs = env
    scale = rollout_env(envs).reference
    if reference is not None and not isinstance(env, str | None):
        scale = TokenModel(as_policy(_lm(reference)).lm.to(chosen.device))
    if scale is None:
        raise ConfigError(
            "KL and perplexity need a reference, and the environment has none: give reference=, a model or its name, "
            "such as agent.penalty.reference"
        )
    policies = {"reference": policy_of(scale, chosen.temperature), "policy": chosen}
    if against is not None:
        policies["other policy"] = _loaded(against)
    return evaluated(policies, envs, scale, prompts=prompts, seed=seed, num_beams=num_beams, metrics=metrics)


def evaluated(
    policies: Mapping[str, ActorCritic],
    envs: Any,
    reference: TokenModel,
    *,
    prompts: int,
    seed: int,
    num_beams: int = 1,
    metrics: Sequence[RewardSpec] = (),
) -> Evaluation:
    """Return the evaluation of several policies; arguments as of `evaluate`.

    A policy with another temperature than 1 has its KL to the reference at the same temperature, as in training.
    """
    base = envs.unwrapped
    chosen = range(min(prompts, len(base.prompts)))
    judge = judge_of(envs.spec.id) if envs.spec is not None else None
    own = base.metrics if isinstance(base, TaskVectorEnv) else ()
    samples: dict[str, Samples] = {}
    figures: dict[str, Figures] = {}
    before = reference.temperature
    for name, policy in policies.items():
        generator = policy.generator
        try:
            samples[name] = generate(policy, envs, chosen, seed, num_beams=num_beams)
            reference.temperature = policy.temperature
            measured = measure(samples[name], reference, judge, metrics)
        finally:
            policy.generator, reference.temperature = generator, before
        figures[name] = {**measured, **(score_intervals(samples[name], own) if own else {})}
    return Evaluation(figures, samples)


def policy_of(model: TokenModel, temperature: float = 1.0) -> ActorCritic:
    """Return a policy that samples from a model, whose weights it shares; its critic is new."""
    with torch.random.fork_rng(devices=[]):  # the new value head must not advance the global generator
        return ActorCritic(model.lm, temperature=temperature)


def _made_for(policy: ActorCritic, env: str | None, run: Run | None, num_envs: int, own: dict[str, Any]) -> Any:
    """Return the environment of an id or of a run for a policy; `own` are arguments of the caller, which count most."""
    settings = {} if run is None or env is not None else run.settings
    name = settings.get("env") if env is None else env
    if name is None:
        raise ConfigError("the environment is not known: give env=, the id of one or a TextVectorEnv")
    saved = json.loads(settings.get("env_kwargs") or "{}")
    arguments: dict[str, Any] = {"kl_mode": "deferred", "array": "torch"}
    if (tokenizer := tokenizer_of(policy.lm)) is not None:
        arguments["tokenizer"] = tokenizer
    if model := (run.settings.get("model") if run is not None else None):
        arguments["reference"] = model
    if policy.decoder_start_ids:
        arguments["decoder_start_ids"] = policy.decoder_start_ids
    if policy.device.type != "cpu":
        arguments["device"] = str(policy.device)
    given = {**{argument: value for argument, value in arguments.items() if argument not in saved}, **own}
    try:
        if run is None or env is not None:
            return gym.make_vec(name, num_envs, **given)
        plain = {"id": name, "num_envs": num_envs, "kwargs": saved}
        return make_environment(plain, run.folder / "config.json", **given)
    except TypeError as error:
        raise ConfigError(
            f"{name} cannot be made: {error}. Give env=, or its further arguments as env_kwargs"
        ) from error


def _run_of(policy: PolicyLike) -> Run | None:
    """Return the run of a folder; `None` if it is none."""
    if isinstance(policy, str | Path) and (Path(policy) / RUN).exists():
        return Run.read(Path(policy))
    return None


def _loaded(policy: PolicyLike) -> ActorCritic:
    run = _run_of(policy)
    if run is None:
        return as_policy(policy)
    if not (run.folder / "policy").exists():
        raise RunFolderError(
            f"{run.folder} has no policy, which is written when a run ends: evaluate that of a checkpoint, "
            "checkpoints/step-.../policy in the folder"
        )
    return ActorCritic.from_pretrained(run.folder / "policy", temperature=run.settings.get("temperature") or 1.0)


def _lm(reference: Any) -> Any:
    """Return a reference as environments take it: a language model or its name."""
    return reference.lm if isinstance(reference, TokenModel) else reference
