"""The `textgym` command: demo, train, resume, reward-model, data, evaluate, chat, list, compare.

    textgym demo
    textgym train --env textgym/Sentiment-v0 --model tiny --total-episodes 4096 --output-dir runs/ppo --seed 1
    textgym resume runs/ppo --total-episodes 8192
    textgym train --config runs/ppo/config.json --output-dir runs/again --seed 2
    textgym train --output-dir runs/ppo --profile
    textgym train --agent grpo --group-size 8 --output-dir runs/grpo
    textgym train --agent sft --data rows.jsonl --output-dir runs/sft
    textgym train --agent dpo --data pairs.jsonl --model runs/sft/policy --output-dir runs/dpo
    textgym reward-model --output-dir runs/reward
    textgym reward-model --output-dir runs/mine --preferences pairs.jsonl --model smollm2
    textgym data pairs.jsonl
    textgym evaluate runs/ppo
    textgym chat runs/ppo
    textgym list runs
    textgym compare runs/ppo runs/grpo
    accelerate launch --config_file examples/accelerate/ddp.yaml -m textgym.cli train --output-dir runs/ppo

It sits on top of both packages, so it and its flags alone in `textgym` may import `textgym.agents`.
"""

from __future__ import annotations

import sys

from textgym.models.machine.determinism import prepare_environment

if __name__ == "__main__":  # python -m textgym.cli: before torch is imported
    prepare_environment(sys.argv[1:])

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from textgym.agents.common.rollout_agent import RolloutAgent
from textgym.agents.common.supervised import SupervisedAgent
from textgym.agents.machine.distributed import device, everyone, join, raise_on_termination, rank
from textgym.agents.runs.chat import chat
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.claims import RunClaim, check_run_folder
from textgym.agents.runs.data_report import data_report
from textgym.agents.runs.demo import DemoConfig
from textgym.agents.runs.demo import run as run_demo
from textgym.agents.runs.display.overview import overview
from textgym.agents.runs.display.warning_signs import WarningSigns
from textgym.agents.runs.evaluation import Judge, Samples, generate, measure, score_intervals
from textgym.agents.runs.heldout import HeldOut, heldout_envs
from textgym.agents.runs.history import Run, compared, draw_over_each_other, list_of
from textgym.agents.runs.interrupts import Interrupts
from textgym.agents.runs.profiling import Profiler
from textgym.agents.runs.progress import LiveProgress, TrainingProgress
from textgym.agents.runs.records import Recorder
from textgym.agents.runs.run_folder import RunFolder, changed_settings, figures_table
from textgym.data.corpora.sources import movie_snippets
from textgym.data.files import atomic_file, check_free
from textgym.data.preferences import (
    PAIRS_PER_GROUP,
    heldout_pairs,
    load_preferences,
    make_preferences,
    placed_preferences,
    text_of,
)
from textgym.display import printable, rich_text
from textgym.envs.tasks.base import TaskVectorEnv
from textgym.errors import TextgymError
from textgym.flags import (
    AGENTS,
    FREE,
    OFFLINE,
    Chat,
    Compare,
    Data,
    Evaluate,
    ListRuns,
    Train,
    TrainReward,
    View,
    check_agent,
    parse,
)
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import load_causal_lm
from textgym.models.machine.devices import device_name, use_device
from textgym.models.machine.seeding import deterministic
from textgym.rewards.functions import lexicon_sentiment
from textgym.rewards.kl import AdaptiveKL, ThresholdKL
from textgym.rewards.models import pairwise_accuracy, train_reward_model
from textgym.rewards.models.report import PreferenceReport
from textgym.rewards.models.reward_model import REWARD_MODEL
from textgym.rewards.models.training import split_preferences
from textgym.viewer.page import write_page


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; exits with 130 after Ctrl-C, and with one line after an error of the user's making."""
    sys.path.append(str(Path.cwd()))  # for "module:attribute" of a file beside the user; last, so it hides no module
    runs: dict[type, Callable[[Any], Any]] = {
        DemoConfig: run_demo,
        Train: train,
        TrainReward: train_reward,
        Data: show_data,
        Evaluate: evaluate,
        View: view,
        Chat: answer,
        ListRuns: list_runs,
        Compare: compare,
    }
    try:
        command = parse(arguments)
        run = next(run for kind, run in runs.items() if isinstance(command, kind))
        if command.deterministic:
            deterministic()
        else:
            torch.set_num_threads(1)  # two threads collapse when another process runs
        run(command)
    except KeyboardInterrupt:
        sys.exit(130)
    except (TextgymError, ValueError, OSError, ImportError, MemoryError, gym.error.Error) as error:
        sys.exit(f"textgym: {printable(' '.join(str(error).split()))}")


def train(command: Train) -> None:
    """An agent on an environment by its id, or on data."""
    check_agent(command)
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
    place = _place(command)
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
        "reference": _reference(command.model, command, place),
        **_kl_arguments(command),
        **_decoder_start(policy),
    }
    envs = _make_envs(command.env, command.num_envs, command.env_kwargs, place, **arguments)
    heldout = None if command.agent in OFFLINE else heldout_envs(envs, command.eval_prompts * bool(command.eval_every))
    agent = _make_agent(command, policy, envs) if newest is None else _load_agent(command, envs, newest, place)
    interrupts = Interrupts(live.console)
    if rank() > 0:
        _learn(agent, command, checkpoints, [], interrupts, resumed=newest is not None)
        return
    policy = agent.policy
    profiler = None
    if command.profile and isinstance(agent, RolloutAgent):
        profiler = Profiler(command.output_dir, agent, command.total_episodes)
    # What was wrong with the command is known by now, so a mistake neither leaves a folder nor deletes an old run.
    claim = claim or RunClaim(command.output_dir, overwrite=command.overwrite)
    folder = RunFolder(command.output_dir, command, agent.updates, claim)
    checkpoints.clean()
    evaluation = None
    if isinstance(agent, RolloutAgent):
        every, seed = command.eval_every or 1, command.config.seed
        evaluation = HeldOut(heldout, agent.penalty.reference, every, seed, command.eval_prompts)
    for title, text in {**overview(agent, command.total_episodes), "folder": str(command.output_dir)}.items():
        live.say(f"{title + ':':<12} {text}")
    shown: list[Any] = [live] if profiler is None else [live, profiler]
    if isinstance(agent, RolloutAgent):
        shown.append(WarningSigns(agent, lambda text: live.say(f"warning: {text}"), folder.history))
    if command.record_every and isinstance(agent, RolloutAgent):
        shown.append(Recorder(command.output_dir, agent, command.record_every))
    try:
        with live:
            live.stage(
                type(agent).__name__,
                command.total_episodes if isinstance(agent, RolloutAgent) else agent.total_updates,
            )
            # Metrics first: what a checkpoint goes on from is reported.
            first = [evaluation, folder] if evaluation is not None and command.eval_every else [folder]
            _learn(agent, command, checkpoints, shown, interrupts, resumed=newest is not None, first=first)
            if interrupts.received is None:
                live.stage("writing samples")
                table = _write_samples(policy, envs, folder, command, evaluation)
            live.finish()
        if interrupts.received is None:
            live.say(table, always=True)
        if profiler is not None and profiler.profile is not None:
            live.console.print(*profiler.profile.tables(), sep="\n")
    finally:  # also after Ctrl-C: what was learned is kept
        envs.close()
        if profiler is not None:
            profiler.close()
        policy.save_pretrained(command.output_dir / "policy", envs.unwrapped.tokenizer, overwrite=True)
        folder.draw_curves()
        folder.close()
        live.say(f"run folder: {command.output_dir}", always=True)
    if interrupts.received is not None:
        live.say(
            f"stopped after update {agent.updates}: `textgym resume {command.output_dir}` goes on from there",
            always=True,
        )
        sys.exit(128 + interrupts.received)
    run = command.output_dir
    longer = f"textgym resume {run} --total-episodes {2 * command.total_episodes}"
    live.say(f"go on: textgym view {run} | textgym evaluate {run} | textgym chat {run} | {longer}")


def _place(command: Train | TrainReward | Evaluate | Chat) -> torch.device:
    """The device that a command asks for, made the current one; of several processes each has one of its own.

    Raises:
        ValueError: it is not on this machine, or the launcher has chosen another kind.
    """
    own = device()
    if own is None:
        return use_device(command.device)
    if command.device not in ("auto", own.type):
        raise ValueError(
            f"the launcher gives this process {own}, and --device asks for {command.device}: leave --device out, and "
            "choose with the launcher (accelerate launch --cpu, --gpu_ids)"
        )
    return own


def _learn(
    agent: RolloutAgent | SupervisedAgent,
    command: Train,
    checkpoints: Checkpoints,
    callbacks: list[Any],
    interrupts: Interrupts,
    resumed: bool,
    first: Sequence[Any] = (),
) -> None:
    """Train, with a checkpoint before the first update, at intervals, and after an interrupt."""
    if not resumed:
        checkpoints.save(agent)
    callbacks = [*first, checkpoints, *callbacks, interrupts]
    with interrupts:
        if isinstance(agent, RolloutAgent):
            agent.learn(command.total_episodes, callbacks)
        else:
            agent.learn(callbacks)
        if any(everyone(interrupts.received is not None)):
            checkpoints.save(agent)


def _newest_checkpoint(command: Train, checkpoints: Checkpoints, live: LiveProgress) -> Path | None:
    """Where a run goes on from, `None` at its beginning."""
    if not command.resume:
        return None
    # The first process looks, since it renames damaged ones; the others go where it goes.
    newest = everyone(checkpoints.newest_whole() if rank() == 0 else None)[0]
    if newest is None:
        live.say(f"{command.output_dir} has no checkpoint to resume from: beginning anew")
    elif changed := changed_settings(command.output_dir, command, FREE):
        raise ValueError(
            f"{command.output_dir} was begun with other settings, and --resume goes on with the same: "
            f"{'; '.join(changed)}"
        )
    return newest


def _make_agent(command: Train, policy: ActorCritic, envs: Any) -> RolloutAgent | SupervisedAgent:
    if command.agent in OFFLINE:
        return OFFLINE[command.agent](policy, command.data, command.model, command.config)
    return AGENTS[command.agent](policy, envs, command.config)


def _load_agent(command: Train, envs: Any, checkpoint: Path, place: torch.device) -> RolloutAgent | SupervisedAgent:
    if command.agent in OFFLINE:
        return OFFLINE[command.agent].load(checkpoint, command.data, place, trust_remote_code=command.trust_remote_code)
    return AGENTS[command.agent].load(checkpoint, envs, place, trust_remote_code=command.trust_remote_code)


def train_reward(command: TrainReward) -> None:
    """A reward model, its accuracy on held-out pairs, and a picture of both: `report.json` and `report.png`."""
    join()
    raise_on_termination()
    check_free(command.output_dir, REWARD_MODEL, overwrite=command.overwrite)
    live, place = LiveProgress(), _place(command)
    live.console.print(f"device: {device_name(place)}", markup=False)
    settings = command.settings
    if command.preferences is None and settings.batch_size is None:
        settings = replace(settings, batch_size=PAIRS_PER_GROUP)
    rows, heldout, calibration = _preferences(command)
    with live:
        live.stage("training the reward model", 1)
        reward, _ = train_reward_model(
            rows,
            command.model,
            config=settings,
            heldout=heldout,
            callbacks=[TrainingProgress(live)],
            device=place,
            trust_remote_code=command.trust_remote_code,
        )
        if rank() > 0:  # the first process writes for all of them
            return
        reward.calibrate(calibration)
        live.finish()
    reward.save_pretrained(command.output_dir, overwrite=command.overwrite)
    report = PreferenceReport.of(reward, heldout)
    with atomic_file(command.output_dir / "report.json") as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    try:
        report.plot(command.output_dir / "report.png")
    except ImportError as error:
        live.console.print(str(error), markup=False)
    live.console.print(f"held-out pairwise accuracy: reward model {report.accuracy}", markup=False)
    if command.preferences is None:
        lexicon = pairwise_accuracy(lexicon_sentiment, heldout)
        live.console.print(f"held-out pairwise accuracy: lexicon {lexicon}", markup=False)
    for bucket in report.by_margin:
        live.console.print(
            f"  margin {bucket.low:.2f} to {bucket.high:.2f}: {bucket.accuracy:.3f} of {bucket.count} pairs"
        )
    live.console.print(f"calibration error: {report.calibration_error:.3f}")
    live.console.print(f"reward model and report: {command.output_dir}", markup=False)


def _preferences(command: TrainReward) -> tuple[list[Any], list[Any], list[Any]]:
    """Pairs to train on, pairs to measure on, and texts to calibrate on."""
    if command.preferences is None:
        snippets = movie_snippets()
        train = [s for s in snippets if s.split == "train"]
        heldout = heldout_pairs([s for s in snippets if s.split != "train"])
        return make_preferences(train, seed=command.settings.seed), heldout, [s.text for s in train[:1000]]
    rows = placed_preferences(command.preferences)
    if command.heldout is not None:
        heldout = load_preferences(command.heldout)
    else:
        rows, held = split_preferences(rows, command.settings.heldout_fraction, command.settings.seed)
        heldout = [row.pair for row in held]
    if not heldout:
        raise ValueError("no pairs are held out: give pairs with several prompts or groups, or --heldout")
    return rows, heldout, [text_of(row.pair, side) for row in rows[:500] for side in ("chosen", "rejected")]


def show_data(command: Data) -> None:
    """What a model will read of a data set."""
    for line in data_report(command.file, command.model, command.reader, command.max_length, command.examples):
        print(printable(line))


def view(command: View) -> None:
    """Write the page of one or several runs."""
    page = write_page(command.runs, command.output_dir, command.single_file)
    print(f"open {page} in a browser")


def evaluate(command: Evaluate) -> None:
    """Figures and samples of a policy and its reference on the same prompts and seeds; a task's own have intervals."""
    live, place = LiveProgress(), _place(command)
    live.console.print(f"device: {device_name(place)}", markup=False)
    policies = {"reference": command.reference, "policy": command.policy}
    loaded = {
        name: ActorCritic.from_pretrained(model, device=place, trust_remote_code=command.trust_remote_code)
        for name, model in policies.items()
    }
    models = {
        "tokenizer": command.reference,
        "reference": _reference(command.reference, command, place),
        **_decoder_start(loaded["policy"]),
    }
    envs = _make_envs(command.env, command.num_envs, command.env_kwargs, place, **models)
    prompts = range(min(command.prompts, len(envs.unwrapped.prompts)))
    samples = {name: generate(policy, envs, prompts, command.seed) for name, policy in loaded.items()}
    scorer = envs.unwrapped.reference
    judge: Judge | None = lexicon_sentiment if command.env == "textgym/Sentiment-v0" else None
    own = envs.unwrapped.metrics if isinstance(envs.unwrapped, TaskVectorEnv) else ()

    def figures(chosen: Samples) -> dict[str, float | str]:
        intervals = {name: str(interval) for name, interval in score_intervals(chosen, own).items()} if own else {}
        return {**measure(chosen, scorer, judge, command.metrics), **intervals}

    live.console.print(
        figures_table(
            f"{len(prompts)} prompts",
            {name: figures(chosen) for name, chosen in samples.items()},
        )
    )
    for transcript in samples["policy"].transcripts[: command.samples]:
        shown = rich_text(transcript["prompt"]), rich_text(transcript["completion"], "bold")
        live.console.print(Text.assemble(*shown))


def _make_envs(env: str, num_envs: int, env_kwargs: str, place: torch.device, **kwargs: Any) -> Any:
    try:
        further = json.loads(env_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs is not JSON: {error}") from error
    if not isinstance(further, dict):
        raise ValueError(f"--env-kwargs must be a JSON object of arguments, got {env_kwargs}")
    if "device" in further:
        raise ValueError(
            f"--env-kwargs has a device, which the policy would not share: leave it out, and give --device "
            f"{further['device']} for both"
        )
    if place.type != "cpu":  # the default of environments
        kwargs["device"] = str(place)
    try:
        return gym.make_vec(env, num_envs, **{"kl_mode": "deferred", "array": "torch", **kwargs, **further})
    except TypeError as error:
        raise ValueError(f"{env} cannot be made: {error}. Its further arguments go into --env-kwargs") from error


def _kl_arguments(command: Train) -> dict[str, Any]:
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


def _reference(model: str, command: Train | Evaluate, place: torch.device) -> Any:
    """The reference as environments take it: a name, or a model whose own code the user trusts."""
    if not command.trust_remote_code:
        return model
    return load_causal_lm(model, device=place, trust_remote_code=True).requires_grad_(False)


def _decoder_start(policy: ActorCritic) -> dict[str, Any]:
    """What the environment is told of an encoder-decoder model; nothing of others."""
    return {"decoder_start_ids": policy.decoder_start_ids} if policy.decoder_start_ids else {}


def _write_samples(
    policy: ActorCritic, envs: Any, folder: RunFolder, command: Train, evaluation: HeldOut | None
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
    judge = lexicon_sentiment if command.env == "textgym/Sentiment-v0" else None
    return evaluation.before_and_after(start, policy, folder, judge)


def answer(command: Chat) -> None:
    """Completions of what is typed, until the end of the input."""
    place = _place(command)
    policy = ActorCritic.from_pretrained(command.policy, device=place)
    reference = ActorCritic.from_pretrained(command.reference, device=place)
    models = {"tokenizer": command.reference, "reference": command.reference, **_decoder_start(policy)}
    envs = _make_envs(command.env, 1, command.env_kwargs, place, on_reward_error="skip", **models)
    print("Type a prompt and press Enter. Ctrl-D ends it.", flush=True)
    chat(policy, envs, reference, sys.stdin, lambda text: print(printable(text), flush=True), command.seed)


def list_runs(command: ListRuns) -> None:
    """A table of the runs in a folder."""
    Console().print(list_of(command.folder))


def compare(command: Compare) -> None:
    """A table and a picture of several runs."""
    runs = [Run.read(folder) for folder in command.runs]
    Console().print(compared(runs))
    draw_over_each_other(runs, command.output)
    print(f"curves: {command.output}")


if __name__ == "__main__":
    main()
