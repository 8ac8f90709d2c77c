"""evaluate: what a policy and its reference write, and how good it is; `textgym evaluate` prints the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
from textgym.settings import Count, Positive, WholeNumber, check_arguments, from_plain

from ..machine.named_envs import arguments_for, known_environment
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
        ConfigError: If there is no environment, or no reference, or the settings of a run are wrong.
        RunFolderError: If the folder of a run has no policy.
        UntrustedNameError: If a run names code that is not textgym's; pass the environment yourself.
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
        scale = TokenModel.load(_lm(reference), device=chosen.device)
        scale.lm.to(chosen.device)
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


def _made_for(
    policy: ActorCritic, env: str | None, run: _EvaluatedRun | None, num_envs: int, own: dict[str, Any]
) -> Any:
    """Return the environment of an id or of a run for a policy; arguments of the caller, `own`, replace all others."""
    name = env if env is not None or run is None else run.settings.env
    if name is None:
        raise ConfigError("the environment is not known: give env=, the id of one or a TextVectorEnv")
    arguments = arguments_for(policy)
    if (tokenizer := tokenizer_of(policy.lm)) is not None:
        arguments["tokenizer"] = tokenizer
    if run is not None and run.settings.model:
        arguments["reference"] = run.settings.model
    try:
        if run is None or env is not None:
            with known_environment(name):
                return gym.make_vec(name, num_envs, **{**arguments, **own})
        saved = run.env_kwargs()
        given = {**{argument: value for argument, value in arguments.items() if argument not in saved}, **own}
        return make_environment({"id": name, "num_envs": num_envs, "kwargs": saved}, run.config, **given)
    except TypeError as error:
        raise ConfigError(
            f"{name} cannot be made: {error}. Give env=, or its further arguments as env_kwargs"
        ) from error


@dataclass(frozen=True)
class _Settings:
    """Settings of a run that its evaluation needs; a run that was begun in Python may have fewer."""

    env: str | None = None
    env_kwargs: str = "{}"
    model: str = ""
    temperature: Positive = 1.0


@dataclass(frozen=True)
class _EvaluatedRun:
    """A run whose policy is evaluated."""

    folder: Path
    settings: _Settings

    @property
    def config(self) -> Path:
        """The file with its settings."""
        return self.folder / "config.json"

    def env_kwargs(self) -> Any:
        """Return the further arguments of its environment, as they were saved."""
        try:
            return json.loads(self.settings.env_kwargs)
        except ValueError as error:
            raise ConfigError(f"{self.config}: env_kwargs is not JSON: {error}. Give env= and env_kwargs=") from error


def _run_of(policy: PolicyLike) -> _EvaluatedRun | None:
    """Return the run of a folder; `None` if it is none."""
    if not isinstance(policy, str | Path) or not (Path(policy) / RUN).exists():
        return None
    run = Run.read(Path(policy))
    names = [field.name for field in fields(_Settings)]
    known = {name: run.settings[name] for name in names if run.settings.get(name) is not None}
    return _EvaluatedRun(run.folder, from_plain(_Settings, known, str(run.folder / "config.json")))


def _loaded(policy: PolicyLike) -> ActorCritic:
    run = _run_of(policy)
    if run is None:
        return as_policy(policy)
    if not (run.folder / "policy").exists():
        raise RunFolderError(
            f"{run.folder} has no policy, which is written when a run ends: evaluate that of a checkpoint, "
            "checkpoints/step-.../policy in the folder"
        )
    return ActorCritic.from_pretrained(run.folder / "policy", temperature=run.settings.temperature)


def _lm(reference: Any) -> Any:
    """Return a reference as environments take it: a language model or its name."""
    return reference.lm if isinstance(reference, TokenModel) else reference
