"""The main job, end to end: human ratings -> preferences -> reward model -> PPO -> before and after.

    textgym demo                                  # `make demo`: a few minutes on two CPU cores
    textgym demo --output-dir runs/mine --seed 1

The policy trains on prompts that neither the language model nor the reward model was trained on, and is evaluated on
prompts that nothing was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import torch

from textgym.data.corpora.sources import Snippet, movie_snippets
from textgym.data.preferences import heldout_pairs, make_preferences
from textgym.data.prompts import snippet_prompts
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.devices import device_name, resolve_device, use_device
from textgym.models.token_model import TokenModel
from textgym.rewards.functions import lexicon_sentiment
from textgym.rewards.kl import AdaptiveKL
from textgym.rewards.models import RewardModel, RewardModelConfig, pairwise_accuracy, train_reward_model
from textgym.settings import Count, NotNegative, Positive, at_least, check_settings

from ..ppo import PPO, PPOConfig
from .evaluation import Samples, generate, measure
from .run_folder import LiveProgress, RunFolder, TrainingProgress, figures_table


@dataclass
class DemoConfig:
    """The main job's settings; the defaults are those of `make demo`."""

    output_dir: Path = Path("runs/demo")
    """Where the run folder is written."""
    model: str = "tiny"
    """The language model: start of the policy, and the reference."""
    total_episodes: Count = 2560
    """Episodes that PPO plays."""
    num_envs: Count = 64
    """Rows of the environment."""
    eval_prompts: Count = 256
    """Held-out prompts that the policy is measured on, before and after."""
    kl_coef: NotNegative = 0.1
    """beta: reward (in deviations of the reference's scores) that a nat of divergence costs."""
    kl_target: Positive | None = None
    """Steer beta so that the KL comes to this many nats a text; `kl_coef` is then where it starts."""
    min_new_tokens: Annotated[int, at_least(0)] = 24
    """24 makes every text 24 tokens long; 0 lets texts end where the model ends them."""
    max_new_tokens: Count = 24
    """Longest completion, in tokens."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a text that did not end within `max_new_tokens`."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """Where to compute: 'cuda', 'cuda:1', 'cpu', or 'auto', which is a GPU where there is one."""
    deterministic: bool = False
    """Repeat the same run bit for bit on the same machine: one number of threads, kernels that always add up alike."""
    reward_model: RewardModelConfig = field(default_factory=lambda: RewardModelConfig(num_layers=2))
    """Training of the reward model."""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(learning_rate=3e-4, minibatch_size=64, value_coef=0.5))
    """Training of the policy."""

    def __post_init__(self) -> None:
        check_settings(self)
        self.ppo = dataclasses.replace(self.ppo, seed=self.seed)
        self.reward_model = dataclasses.replace(self.reward_model, seed=self.seed)


def run(config: DemoConfig) -> dict[str, dict[str, float]]:
    """Runs all stages and fills the run folder; returns the figures before and after.

    Interrupted by Ctrl-C, it stops where it is and keeps what was written.
    """
    live = LiveProgress()
    live.console.print(f"device: {device_name(use_device(config.device))}", markup=False)
    folder = RunFolder(config.output_dir, config)
    snippets = movie_snippets()
    try:
        with live:
            reward, accuracies = learn_reward(config, snippets, live)
            return improve(config, reward, accuracies, folder, live)
    finally:
        folder.draw_curves()
        folder.close()
        live.console.print(f"run folder: {config.output_dir}")


def improve(
    config: DemoConfig, reward: RewardModel, accuracies: dict[str, float], folder: RunFolder, live: LiveProgress
) -> dict[str, dict[str, float]]:
    """Measures, trains and measures again; writes policy, samples and figures."""
    policy, reference = start(config, reward, folder.folder / "reward_model")
    test = make_envs(config, reward, snippet_prompts("test"))
    live.stage("measuring before")
    before = generate(policy, test, range(config.eval_prompts), config.seed)
    agent = PPO(policy, make_envs(config, reward, snippet_prompts("policy")), config.ppo)
    live.stage("PPO", config.total_episodes)
    agent.learn(config.total_episodes, [folder, live])
    live.stage("measuring after")
    after = generate(policy, test, range(config.eval_prompts), config.seed)
    live.finish()
    figures = {name: measure(s, reference, lexicon_sentiment) for name, s in (("before", before), ("after", after))}
    policy.save_pretrained(folder.folder / "policy", test.unwrapped.task.tokenizer)
    report(figures, accuracies, before, after, folder, live)
    return figures


def start(config: DemoConfig, reward: RewardModel, reward_folder: Path) -> tuple[ActorCritic, TokenModel]:
    """The policy before training and the frozen reference, on whose samples the reward's scores are calibrated."""
    calibrate(reward, ActorCritic.from_pretrained(config.model, device=config.device), config)
    reward.save_pretrained(reward_folder)
    policy = with_critic(config, reward, reward_folder)
    return policy, policy.reference()


def with_critic(config: DemoConfig, reward: RewardModel, reward_folder: Path) -> ActorCritic:
    """The policy before training, its critic a copy of the reward model, which was saved in `reward_folder`.

    What the reward model says of a text so far is a first guess at what it will say of the whole, so a critic that
    starts as its copy is of use at once.
    """
    policy = ActorCritic.from_pretrained(config.model, critic=str(reward_folder), device=config.device)
    with torch.no_grad():
        policy.value_head.weight.copy_(reward.gain * reward.model.score.weight)
        policy.value_head.bias.fill_(reward.bias)
    return policy


def learn_reward(
    config: DemoConfig, snippets: Sequence[Snippet], live: LiveProgress
) -> tuple[RewardModel, dict[str, float]]:
    """A reward model from preferences between train snippets; its held-out accuracy beside the lexicon's."""
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
    accuracies = {"reward model": accuracy, "lexicon": pairwise_accuracy(lexicon_sentiment, heldout)}
    live.finish()
    live.console.print(
        f"held-out pairwise accuracy ({len(heldout)} pairs, rating gap above 1): "
        + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
    )
    return reward, accuracies


def make_envs(config: DemoConfig, reward: Any, prompts: Any) -> Any:
    """`textgym/Sentiment-v0` in the form that agents take, with these prompts."""
    place = resolve_device(config.device)
    own: dict[str, Any] = {} if place.type == "cpu" else {"device": str(place)}
    return gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=config.num_envs,
        prompts=prompts,
        tokenizer=config.model,
        reward=reward,
        reference=config.model,
        kl_coef=AdaptiveKL(config.kl_target, 1000, config.kl_coef) if config.kl_target else config.kl_coef,
        kl_mode="deferred",
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        missing_eos_penalty=config.missing_eos_penalty,
        array="torch",
        **own,
    )


def calibrate(reward: RewardModel, reference: ActorCritic, config: DemoConfig) -> None:
    """Moves the scores of the reference's own samples to mean 0 and deviation 1."""
    prompts = snippet_prompts("policy")
    envs = make_envs(config, reward, prompts)
    samples = generate(reference, envs, range(min(512, len(prompts))), config.seed + 1)
    reward.calibrate([row["prompt"] + row["completion"] for row in samples.transcripts])


def report(
    figures: dict[str, dict[str, float]],
    accuracies: dict[str, float],
    before: Samples,
    after: Samples,
    folder: RunFolder,
    live: LiveProgress,
) -> None:
    """Prints the figures and a few samples, and writes all samples."""
    prompts = [transcript["prompt"] for transcript in before.transcripts]
    folder.write_samples({"before": before.completions, "after": after.completions}, prompts)
    folder.write_json("evaluation.json", {"reward_model_accuracy": accuracies, **figures})
    live.console.print(figures_table(f"{len(prompts)} held-out prompts, the same seeds", figures))
    gain = (figures["after"]["score"] - figures["before"]["score"]) / figures["before"]["score_std"]
    live.console.print(f"score {gain:+.2f} deviations of the reference's scores")
    live.console.print(samples_table(prompts, before.completions, after.completions))


def samples_table(prompts: Sequence[str], before: Sequence[str], after: Sequence[str], rows: int = 8) -> Any:
    """The first few prompts with their completions before and after."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="samples", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for row in list(zip(prompts, before, after, strict=True))[:rows]:
        table.add_row(*map(Text, row))
    return table
