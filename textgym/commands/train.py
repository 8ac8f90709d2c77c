"""textgym train and resume."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from textgym import agents
from textgym.agents.callbacks import Callback, CallbackLike
from textgym.agents.common.rollout_agent import RolloutAgent
from textgym.agents.common.supervised import SupervisedAgent
from textgym.agents.machine.distributed import everyone, join, raise_on_termination, rank
from textgym.agents.machine.named_envs import heldout_envs
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.claims import RunClaim, check_run_folder
from textgym.agents.runs.evaluation import Judge
from textgym.agents.runs.heldout import HeldOut, before_and_after, judge_of
from textgym.agents.runs.profiling import Profiler
from textgym.agents.runs.progress import LiveProgress
from textgym.agents.runs.run_folder import RunFolder, changed_settings
from textgym.agents.watching.best import EarlyStop, KeepBest
from textgym.agents.watching.run import WatchedRun
from textgym.agents.watching.trackers import Trackers
from textgym.algorithms import ALGORITHMS, OFFLINE
from textgym.commands.hints import further_commands, resume_hint
from textgym.commands.models import decoder_start, make_envs, place_of, reference_of
from textgym.flags import FREE, Train, check_agent, with_critic
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.devices import device_name
from textgym.rewards.kl import AdaptiveKL, ThresholdKL


def train(command: Train) -> None:
    """An agent on an environment by its id, or on data."""
    check_agent(command)
    command = with_critic(command)
    join()
    raise_on_termination()
    claim = None
    if rank() == 0:  # the first process writes for all of them
        check_run_folder(command.output_dir, resume=command.resume, overwrite=command.overwrite)
        claim = RunClaim(command.output_dir, resume=True) if command.resume else None
    try:
        _train(command, claim)
    finally:
        if claim is not None:
            claim.release()


def _train(command: Train, claim: RunClaim | None) -> None:
    live = LiveProgress(quiet=command.quiet)
    place = place_of(command)
    if rank() == 0:
        live.say(f"device: {device_name(place)}")
    checkpoints = Checkpoints(command.output_dir / "checkpoints", command.checkpoint_every, command.keep_checkpoints)
    newest = _newest_checkpoint(command, checkpoints, live)
    policy = ActorCritic.from_pretrained(
        command.model,
        critic=command.critic,
        temperature=command.temperature,
        device=place,
        trust_remote_code=command.trust_remote_code,
    )
    arguments = {
        "tokenizer": command.model,
        "reference": reference_of(command.model, command, place),
        **kl_arguments(command),
        **decoder_start(policy),
    }
    envs = make_envs(command.env, command.num_envs, command.env_kwargs, place, **arguments)
    heldout = None if command.agent in OFFLINE else heldout_envs(envs, command.eval_prompts * bool(command.eval_every))
    agent = _make_agent(command, policy, envs) if newest is None else _load_agent(command, envs, newest, place)
    total = command.total_episodes
    resumed = newest is not None
    if rank() > 0:
        beside = WatchedRun(agent, LiveProgress(quiet=True), checkpoints=checkpoints)
        with beside.learning(_judges(command), resumed) as callbacks:
            _learn(agent, total, callbacks)
        return
    policy = agent.policy
    profiler = None
    if command.profile and isinstance(agent, RolloutAgent):
        profiler = Profiler(command.output_dir, agent, total)
    trackers = Trackers(command.log_with, command.output_dir, asdict(command)) if command.log_with else None
    # What was wrong with the command is known by now, so a mistake neither leaves a folder nor deletes an old run.
    claim = claim or RunClaim(command.output_dir, overwrite=command.overwrite)
    folder = RunFolder(command.output_dir, command, agent.updates, claim)
    checkpoints.clean()
    evaluation = None
    if isinstance(agent, RolloutAgent):
        every, seed = command.eval_every or 1, command.config.seed
        evaluation = HeldOut(heldout, agent.penalty.reference, every, seed, command.eval_prompts)
    judge = judge_of(command.env)
    run = WatchedRun(
        agent,
        live,
        total_episodes=total,
        folder=folder,
        heldout=evaluation if command.eval_every else None,
        checkpoints=checkpoints,
        record_every=command.record_every,
        judge=judge,
        profiler=profiler,
        trackers=trackers,
        at_the_end=lambda: _write_samples(policy, envs, folder, command, evaluation, judge),
    )
    try:
        with run.learning(_judges(command), resumed) as callbacks:
            _learn(agent, total, callbacks)
    finally:
        envs.close()
    if run.interrupts.received is not None:
        again = f"`{resume_hint(command)}` goes on from there"
        live.say(f"stopped after update {agent.updates}: {again}", always=True)
        sys.exit(128 + run.interrupts.received)
    live.say(f"go on: {' | '.join(further_commands(command))}")


def _judges(command: Train) -> list[Callback]:
    """Return the callbacks that judge the policy by its evaluations; all processes have them."""
    judges: list[Callback] = [KeepBest(command.output_dir / "best")] if command.keep_best else []
    if command.patience is not None:
        judges.append(EarlyStop(command.patience))
    return judges


def _learn(agent: RolloutAgent | SupervisedAgent, total_episodes: int, callback: CallbackLike) -> None:
    if isinstance(agent, RolloutAgent):
        agent.learn(total_episodes, callback)
    else:
        agent.learn(callback)


def _newest_checkpoint(command: Train, checkpoints: Checkpoints, live: LiveProgress) -> Path | None:
    """Return the checkpoint from which a run continues; `None` at its beginning."""
    if not command.resume:
        return None
    # The first process looks, since it renames damaged ones; the others go where it goes.
    newest = everyone(checkpoints.newest_whole() if rank() == 0 else None)[0]
    if newest is None:
        live.say(f"{command.output_dir} has no checkpoint to resume from: it starts again")
    elif changed := changed_settings(command.output_dir, command, FREE):
        raise ValueError(
            f"{command.output_dir} started with other settings, and --resume must have the same: {'; '.join(changed)}"
        )
    return newest


def _make_agent(command: Train, policy: ActorCritic, envs: Any) -> RolloutAgent | SupervisedAgent:
    if command.agent in OFFLINE:
        return _algorithm(command)(policy, command.data, command.model, command.config)
    return _algorithm(command)(policy, envs, command.config)


def _load_agent(command: Train, envs: Any, checkpoint: Path, place: torch.device) -> RolloutAgent | SupervisedAgent:
    if command.agent in OFFLINE:
        return _algorithm(command).load(checkpoint, command.data, place, trust_remote_code=command.trust_remote_code)
    return _algorithm(command).load(checkpoint, envs, place, trust_remote_code=command.trust_remote_code)


def kl_arguments(command: Train) -> dict[str, Any]:
    """The arguments of the environment that the KL flags stand for."""
    arguments: dict[str, Any] = {"kl_estimator": command.kl_estimator, "kl_clamp": command.kl_clamp}
    if command.kl_target is not None and command.kl_bounds is not None:
        raise ValueError("--kl-target and --kl-bounds both steer beta: give one of them")
    if command.kl_target is not None:
        arguments["kl_coef"] = AdaptiveKL(command.kl_target, coef=command.kl_coef or 0.1)
    elif command.kl_bounds is not None:
        arguments["kl_coef"] = ThresholdKL(*command.kl_bounds, coef=command.kl_coef or 0.1)
    elif command.kl_coef is not None:
        arguments["kl_coef"] = command.kl_coef
    return arguments


def _write_samples(
    policy: ActorCritic,
    envs: Any,
    folder: RunFolder,
    command: Train,
    evaluation: HeldOut | None,
    judge: Judge | None,
) -> Table:
    """Write texts of the policy and of its start, and return a table of their figures."""
    start = ActorCritic.from_pretrained(
        command.model,
        temperature=command.temperature,
        device=policy.device,
        trust_remote_code=command.trust_remote_code,
    )
    if evaluation is None:
        evaluation = HeldOut(envs, start, seed=command.config.seed, samples=command.eval_prompts)
    return before_and_after(evaluation.answers(start), evaluation.answers(policy), folder, judge)


def _algorithm(command: Train) -> Any:
    return getattr(agents, ALGORITHMS[command.agent])
