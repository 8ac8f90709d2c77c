"""The demo: human ratings -> preferences -> reward model -> PPO -> evaluation before and after.

    textgym demo                                  # `make demo`: a few minutes on two CPU cores
    textgym demo --output-dir runs/mine --seed 1

The policy trains on prompts that neither the language model nor the reward model was trained on, and is evaluated on
prompts that nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from textgym.data.corpora.sources import Snippet, movie_snippets
from textgym.data.preferences import heldout_pairs, make_preferences
from textgym.data.prompts import snippet_prompts
from textgym.display import rich_text
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.devices import device_name, resolve_device, use_device
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import AdaptiveKL
from textgym.rewards.models import Accuracy, RewardModel, pairwise_accuracy, train_reward_model

from ..configs.demo import DemoConfig
from ..ppo import PPO
from .claims import RunClaim
from .evaluation import Judge, Samples, generate, measure
from .heldout import judge_of
from .progress import LiveProgress, TrainingProgress
from .records import Recorder
from .run_folder import RunFolder, figures_table


def run(config: DemoConfig) -> dict[str, dict[str, float]]:
    """Run all stages, write the run folder, and return the metrics before and after; Ctrl-C keeps what was written."""
    live = LiveProgress()
    live.console.print(f"device: {device_name(use_device(config.device))}", markup=False)
    claim = RunClaim(config.output_dir, overwrite=config.overwrite)
    folder = RunFolder(config.output_dir, config, claim=claim)
    snippets = movie_snippets()
    try:
        with live:
            judge = judge_of("textgym/Sentiment-v0")
            reward, accuracies = learn_reward(config, snippets, judge, live)
            return improve(config, reward, judge, accuracies, folder, live)
    finally:
        folder.draw_curves()
        folder.close()
        live.console.print(f"run folder: {config.output_dir}", markup=False)


def improve(
    config: DemoConfig,
    reward: RewardModel,
    judge: Judge | None,
    accuracies: dict[str, Accuracy],
    folder: RunFolder,
    live: LiveProgress,
) -> dict[str, dict[str, float]]:
    """Evaluate, train and evaluate again; write policy, samples and metrics."""
    policy, reference = start(config, reward, folder.folder / "reward_model")
    test = make_envs(config, reward, snippet_prompts("test"))
    live.stage("evaluating before")
    before = generate(policy, test, range(config.eval_prompts), config.seed)
    agent = PPO(policy, make_envs(config, reward, snippet_prompts("policy")), config.ppo)
    live.stage("PPO", config.total_episodes)
    agent.learn(config.total_episodes, [folder, live, Recorder(folder.folder, agent)])
    live.stage("evaluating after")
    after = generate(policy, test, range(config.eval_prompts), config.seed)
    live.finish()
    metrics = {name: measure(s, reference, judge) for name, s in (("before", before), ("after", after))}
    policy.save_pretrained(folder.folder / "policy", test.unwrapped.tokenizer, overwrite=True)
    report(metrics, accuracies, before, after, folder, live)
    return metrics


def start(config: DemoConfig, reward: RewardModel, reward_folder: Path) -> tuple[ActorCritic, TokenModel]:
    """Calibrate the reward model, and return the initial policy and the frozen reference."""
    calibrate(reward, ActorCritic.from_pretrained(config.model, device=config.device), config)
    reward.save_pretrained(reward_folder, overwrite=True)
    policy = with_critic(config, reward, reward_folder)
    return policy, policy.reference()


def with_critic(config: DemoConfig, reward: RewardModel, reward_folder: Path) -> ActorCritic:
    """Return the initial policy, with a critic that is a copy of the reward model in `reward_folder`.

    The reward model's score of a text so far is a good first estimate of the score of the whole text.
    """
    policy = ActorCritic.from_pretrained(config.model, critic=str(reward_folder), device=config.device)
    with torch.no_grad():
        policy.value_head.weight.copy_(reward.gain * reward.model.score.weight)
        policy.value_head.bias.fill_(reward.bias)
    return policy


def learn_reward(
    config: DemoConfig, snippets: Sequence[Snippet], judge: Judge | None, live: LiveProgress
) -> tuple[RewardModel, dict[str, Accuracy]]:
    """Train a reward model on the train snippets; return it and the held-out accuracy of itself and of the judge."""
    live.stage("training the reward model", 1)
    pairs = make_preferences([s for s in snippets if s.split == "train"], seed=config.seed)
    heldout = heldout_pairs([s for s in snippets if s.split != "train"], seed=0)
    reward, accuracy = train_reward_model(
        pairs,
        config.model,
        config=config.reward_model,
        heldout=heldout,
        callbacks=[TrainingProgress(live)],
        device=config.device,
    )
    accuracies = {"reward model": accuracy}
    if judge is not None:
        accuracies["lexicon"] = pairwise_accuracy(judge, heldout)
    live.finish()
    live.console.print(
        "held-out pairwise accuracy (rating gap above 1): "
        + ", ".join(f"{name} {value}" for name, value in accuracies.items())
    )
    return reward, accuracies


def make_envs(config: DemoConfig, reward: Any, prompts: Any) -> Any:
    """Make `textgym/Sentiment-v0` with these prompts for an agent."""
    device = resolve_device(config.device)
    arguments: dict[str, Any] = {} if device.type == "cpu" else {"device": str(device)}
    return gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=config.num_envs,
        prompts=prompts,
        tokenizer=config.model,
        reward=reward,
        reference=config.model,
        kl_coef=AdaptiveKL(config.kl_target, coef=config.kl_coef) if config.kl_target else config.kl_coef,
        kl_mode="deferred",
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        missing_eos_penalty=config.missing_eos_penalty,
        array="torch",
        **arguments,
    )


def calibrate(reward: RewardModel, reference: ActorCritic, config: DemoConfig) -> None:
    """Calibrate the reward model, so that scores of the reference's samples have mean 0 and standard deviation 1."""
    prompts = snippet_prompts("policy")
    envs = make_envs(config, reward, prompts)
    samples = generate(reference, envs, range(min(512, len(prompts))), config.seed + 1)
    reward.calibrate([row["prompt"] + row["completion"] for row in samples.transcripts])


def report(
    metrics: dict[str, dict[str, float]],
    accuracies: dict[str, Accuracy],
    before: Samples,
    after: Samples,
    folder: RunFolder,
    live: LiveProgress,
) -> None:
    """Print the metrics and a few samples, and write all samples."""
    prompts = [transcript["prompt"] for transcript in before.transcripts]
    folder.write_samples({"before": before.completions, "after": after.completions}, prompts)
    folder.write_json("evaluation.json", {"reward_model_accuracy": accuracies, **metrics})
    live.console.print(figures_table(f"{len(prompts)} held-out prompts, the same seeds", metrics))
    gain = (metrics["after"]["score"] - metrics["before"]["score"]) / metrics["before"]["score_std"]
    live.console.print(f"score {gain:+.2f} standard deviations of the reference's scores")
    live.console.print(samples_table(prompts, before.completions, after.completions))


def samples_table(prompts: Sequence[str], before: Sequence[str], after: Sequence[str], rows: int = 8) -> Any:
    """Return a table of the first few prompts with their completions before and after."""
    from rich.table import Table

    table = Table(title="samples", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for row in list(zip(prompts, before, after, strict=True))[:rows]:
        table.add_row(*map(rich_text, row))
    return table
