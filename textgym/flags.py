"""The flags of the `textgym` command, and what a command line asks for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from textgym.agents import PPOConfig
from textgym.agents.configs.demo import DemoConfig
from textgym.agents.configs.policy_gradient import suitable_critic
from textgym.agents.configs.rollout import RolloutAgentConfig
from textgym.agents.configs.supervised import SupervisedConfig
from textgym.algorithms import ALGORITHMS, CONFIGS, DEFAULT, OFFLINE, agent_named
from textgym.errors import ConfigError
from textgym.help import asks_for_help, print_command, print_commands
from textgym.rewards.models.config import RewardModelConfig
from textgym.saved_flags import expand
from textgym.settings import (
    Count,
    Estimator,
    NotNegative,
    Positive,
    PositiveShare,
    Reader,
    Seed,
    WholeNumber,
    check_settings,
    nearest,
)

if TYPE_CHECKING:
    AgentName = str
else:
    AgentName = Literal[tuple(ALGORITHMS)]
FREE = (
    "output_dir",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "record_every",
    "profile",
    "device",
    "deterministic",
    "overwrite",
    "trust_remote_code",
    "quiet",
    "log_with",
    "keep_best",
    "patience",
    "total_episodes",
    "epochs",
    "max_steps",
)
"""Settings of `train` that may change when a run goes on."""
SECTIONS: dict[str, tuple[str, ...]] = {
    "what is trained": (
        "agent",
        "model",
        "critic",
        "temperature",
        "env",
        "env_kwargs",
        "data",
        "total_episodes",
        "num_envs",
    ),
    "the KL penalty": ("kl_coef", "kl_target", "kl_bounds", "kl_clamp", "kl_estimator"),
    "the run folder": (
        "output_dir",
        "resume",
        "overwrite",
        "checkpoint_every",
        "keep_checkpoints",
        "record_every",
        "eval_every",
        "eval_prompts",
        "keep_best",
        "patience",
        "log_with",
    ),
}
"""Headings of the help of `train`; settings without one stand under "other options"."""


@dataclass
class Train:
    """Trains a policy with one of the agents and leaves a run folder."""

    output_dir: Path
    """Where the run folder is written."""
    agent: AgentName = "ppo"
    """Which algorithm; its own settings are further flags, and `--agent NAME --help` lists them."""
    data: str | None = None
    """Data of "sft" and "dpo": a .jsonl file or 'module:attribute'. The other agents read no data."""
    env: str = "textgym/Sentiment-v0"
    """Id of the environment; "sft" and "dpo" write samples in it."""
    model: str = "tiny"
    """The policy's start: 'tiny', 'smollm2', a hub id or a path."""
    total_episodes: Count = 4096
    """Number of episodes; the last update has what is left of them. "sft" and "dpo" have `epochs` instead."""
    num_envs: Count = 64
    """Rows of the environment; with several processes, rows of each one."""
    critic: str = "auto"
    """'shared', 'separate', a model whose trunk the critic starts from, or 'auto': for agents that learn values
    'separate' with three times the policy's learning rate, and 'shared' for the others."""
    temperature: Positive = 1.0
    """Divisor of the logits, in sampling and in training."""
    kl_coef: NotNegative | None = None
    """beta, the weight of the KL penalty; the environment's default if not given."""
    kl_target: Positive | None = None
    """Adapt beta so that the KL reaches this many nats per episode."""
    kl_bounds: tuple[float, float] | None = None
    """Halve beta while the KL is below the first number, double it while it is above the second; nats per episode."""
    kl_clamp: Positive | None = None
    """Clip the KL estimate of each token to this many nats, above and below 0."""
    kl_estimator: Estimator = "k1"
    """How the KL is estimated."""
    env_kwargs: str = "{}"
    """Further arguments of the environment, as JSON."""
    checkpoint_every: Count = 10
    """Number of updates between checkpoints."""
    keep_checkpoints: Count = 2
    """Number of checkpoints to keep, the newest ones."""
    record_every: WholeNumber = 20
    """Number of updates between records of tokens for `textgym view`; 0 for none."""
    resume: bool = False
    """Continue from the newest checkpoint in `output_dir`, after a kill or a crash; without one the run starts anew."""
    overwrite: bool = False
    """Delete the run that is in `output_dir`; files that textgym did not write stay."""
    profile: bool = False
    """Measure six updates: time, arithmetic and memory by phase, into `profile.md`, `profile.json`, `trace.json.gz`."""
    device: str = "auto"
    """Where to compute: 'cuda', 'cuda:1', 'cpu', or 'auto', which is a GPU where there is one."""
    trust_remote_code: bool = False
    """Run code that comes with a model: only with models whose code you have read, or whose source you trust."""
    deterministic: bool = False
    """Repeat the same run bit for bit on the same machine: one number of threads, kernels that always add up alike."""
    eval_every: WholeNumber = 10
    """Number of updates between evaluations on held-out prompts; one more is at the end. 0 for none."""
    eval_prompts: Count = 64
    """Number of prompts that are held out for the evaluation, at most a tenth of all."""
    keep_best: bool = False
    """Keep in `best` the agent whose evaluation has the highest score minus KL penalty."""
    patience: Count | None = None
    """End the run after this many evaluations in a row without a higher score minus KL penalty."""
    quiet: bool = False
    """Show nothing but errors and the table at the end."""
    log_with: tuple[str, ...] = ()
    """Trackers that get metrics, samples and settings too: tensorboard, wandb, mlflow, trackio, aim and others of
    accelerate, with commas or spaces between them."""
    config: tyro.conf.OmitArgPrefixes[RolloutAgentConfig | SupervisedConfig] = field(default_factory=PPOConfig)
    """The agent's own settings."""

    def __post_init__(self) -> None:
        check_settings(self)


def with_critic(command: Train) -> Train:
    """Return the command with a critic that suits the agent in place of "auto", so that `config.json` says which."""
    if command.critic != "auto":
        return command
    critic, config = suitable_critic(command.config)
    return dataclasses.replace(command, critic=critic, config=config)


def check_agent(command: Train) -> None:
    """Check that an agent has the data that it needs, and no options that it would ignore."""
    if command.agent in OFFLINE and command.data is None:
        rows = "'prompt' and 'completion'" if command.agent == "sft" else "'prompt', 'chosen' and 'rejected'"
        raise ValueError(f"--agent {command.agent} learns from data: give --data FILE.jsonl, with {rows} a line")
    if command.agent in OFFLINE and command.profile:
        raise ValueError(f"--profile looks at the phases of agents that play episodes, not at {command.agent!r}")
    steered = (command.kl_coef, command.kl_target, command.kl_bounds, command.kl_clamp)
    if command.agent in OFFLINE and any(value is not None for value in steered):
        raise ValueError(
            f"--agent {command.agent} plays no episodes and pays no KL: leave --kl-coef, --kl-target, --kl-bounds and "
            "--kl-clamp out (DPO's beta is --beta)"
        )
    if command.agent not in OFFLINE and command.data is not None:
        raise ValueError(
            f"--agent {command.agent} learns from episodes and does not read --data: leave it out, give "
            'prompts as --env-kwargs \'{"prompts": "FILE.jsonl"}\', or use --agent sft or dpo'
        )
    judges = [flag for flag, given in (("--keep-best", command.keep_best), ("--patience", command.patience)) if given]
    if judges and command.agent in OFFLINE:
        raise ValueError(f"{judges[0]} judges episodes on held-out prompts, and --agent {command.agent} plays none")
    if judges and not command.eval_every:
        raise ValueError(f"{judges[0]} needs evaluations: give --eval-every above 0")


@dataclass
class TrainReward:
    """Trains a reward model on preferences: yours, or some made from human ratings."""

    output_dir: Path
    """Folder for the reward model."""
    model: str = "tiny"
    """The trunk it starts from: 'tiny', 'smollm2', a hub id or a path."""
    preferences: Path | None = None
    """A .jsonl file of pairs with 'chosen' and 'rejected', or of rankings with 'completions' and 'ranks' or 'ratings';
    made from human ratings of movie snippets if not given."""
    heldout: Path | None = None
    """A .jsonl file of the same form for the evaluation; a share of `preferences` if not given."""
    overwrite: bool = False
    """Replace the reward model that is in `output_dir`; files that textgym did not write stay."""
    device: str = "auto"
    """Where to compute: 'cuda', 'cuda:1', 'cpu', or 'auto', which is a GPU where there is one."""
    trust_remote_code: bool = False
    """Run code that comes with a model: only with models whose code you have read, or whose source you trust."""
    deterministic: bool = False
    """Repeat the same run bit for bit on the same machine: one number of threads, kernels that always add up alike."""
    settings: tyro.conf.OmitArgPrefixes[RewardModelConfig] = field(default_factory=RewardModelConfig)
    """Its training."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class Data:
    """Prints what a model will read of a data set: counts, cut tokens, warnings, and a few texts."""

    file: tyro.conf.Positional[str]
    """A .jsonl file, or 'module:attribute'."""
    model: str = "tiny"
    """The model to train; the report uses its tokenizer and its maximum length."""
    reader: Reader | None = None
    """What will be trained on the data; all that can read it if not given."""
    max_length: Count = 512
    """Maximum number of tokens of a text."""
    examples: WholeNumber = 3
    """How many rows to show."""
    deterministic: ClassVar[bool] = False  # nothing here is random

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class Chat:
    """Reads prompts, a line each, and shows what a policy writes, with its score."""

    policy: str
    """A policy folder, or any model name; `textgym chat runs/x` fills in all of these."""
    env: str = "textgym/Sentiment-v0"
    """Id of the environment, which scores the completions."""
    reference: str = "tiny"
    """The reference model of the KL."""
    temperature: Positive = 1.0
    """Divides the logits of both; `textgym chat runs/x` takes that of the run."""
    seed: Seed = 0
    """Seed of the first completion."""
    env_kwargs: str = "{}"
    """Further arguments of the environment, as JSON."""
    device: str = "auto"
    """Where to compute: 'cuda', 'cuda:1', 'cpu', or 'auto', which is a GPU where there is one."""
    trust_remote_code: bool = False
    """Run code that comes with a model: only with models whose code you have read, or whose source you trust."""
    deterministic: bool = False
    """Repeat the same answers bit for bit on the same machine."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class ListRuns:
    """Lists the runs in a folder and below it: agent, environment, state, updates, score and KL."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """The folder."""
    deterministic: ClassVar[bool] = False  # nothing here is random


@dataclass
class Compare:
    """Prints the metrics of several runs side by side, with intervals, and draws their curves in one picture."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of the runs."""
    output: Path = Path("comparison.png")
    """The picture of the curves."""
    deterministic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("textgym compare needs the folders of the runs: textgym compare runs/a runs/b")


@dataclass
class Evaluate:
    """Prints samples and metrics of a policy and of its reference."""

    policy: str
    """A policy folder, or any model name."""
    env: str = "textgym/Sentiment-v0"
    """Id of the environment."""
    reference: str = "tiny"
    """The model that the policy is compared with; KL and perplexity are measured against it."""
    temperature: Positive = 1.0
    """Divides the logits of all policies and of the reference; `textgym evaluate runs/x` takes that of the run."""
    prompts: Count = 128
    """Number of prompts; the first ones of the environment are used."""
    num_envs: Count = 64
    """Rows of the environment."""
    metrics: tuple[str, ...] = ()
    """Further reward functions to report, as 'module:attribute', such as textgym.rewards.functions:DistinctN."""
    samples: WholeNumber = 5
    """How many completions to show."""
    against: str | None = None
    """Another policy, to compare with beside the reference: a policy folder, or any model name."""
    pairwise_sheet: Path | None = None
    """Write a sheet for raters, with this name and '.csv', '.html', '.key.json': completions of the policy and of
    `against`, or of the reference, in blinded pairs."""
    seed: Seed = 0
    """Seed of the sampling."""
    min_p: PositiveShare | None = None
    """Only sample tokens that are at least this share as likely as the most likely one."""
    repetition_penalty: Positive = 1.0
    """Divide positive logits of tokens of prompt and response by this, and multiply negative ones."""
    no_repeat_ngram_size: Count | None = None
    """No sequence of so many tokens of prompt and response occurs twice."""
    num_beams: Count = 1
    """Beams of a beam search, which replaces the sampling; 1 for none."""
    env_kwargs: str = "{}"
    """Further arguments of the environment, as JSON."""
    device: str = "auto"
    """Where to compute: 'cuda', 'cuda:1', 'cpu', or 'auto', which is a GPU where there is one."""
    trust_remote_code: bool = False
    """Run code that comes with a model: only with models whose code you have read, or whose source you trust."""
    deterministic: bool = False
    """Repeat the same run bit for bit on the same machine: one number of threads, kernels that always add up alike."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class View:
    """Writes a page that shows runs: curves, responses, and the numbers of every token."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; several are shown over each other."""
    output_dir: Path | None = None
    """Where the page is written; `viewer` in the first run folder if not given."""
    single_file: bool = False
    """Put everything into one `index.html`, for small runs."""
    follow: bool = False
    """Write the page again while its runs train, until they end or Ctrl-C; an open page renews itself."""
    deterministic: ClassVar[bool] = False  # nothing here is random

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.runs:
            raise ConfigError("textgym view needs a run folder: textgym view runs/ppo")
        if self.follow and self.single_file:
            raise ConfigError("a single file cannot renew itself: give --follow or --single-file, not both")


@dataclass
class ReadSheet:
    """Prints the win rate that raters gave a policy, with its interval over prompts, and how far they agree."""

    key: tyro.conf.Positional[Path]
    """The '.key.json' that `textgym evaluate --pairwise-sheet` wrote."""
    sheets: tyro.conf.Positional[tuple[Path, ...]]
    """Files with the columns 'id' and 'choice' (1, 2, or 0 if both are alike), one of each rater."""
    deterministic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.sheets:
            raise ConfigError("textgym read-sheet needs the answers: textgym read-sheet sheet.key.json answers.csv")


COMMANDS: dict[str, type[Any]] = {
    "demo": DemoConfig,
    "train": Train,
    "resume": Train,
    "reward-model": TrainReward,
    "data": Data,
    "view": View,
    "evaluate": Evaluate,
    "read-sheet": ReadSheet,
    "chat": Chat,
    "list": ListRuns,
    "compare": Compare,
}


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The command that a command line asks for; the flags of `train` are those of the agent that it names.

    Raises:
        SystemExit: help was asked for and shown, or a flag is wrong and tyro said so.
        ConfigError: there is no such command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print_commands(COMMANDS)
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        raise ConfigError(f"there is no command {words[0]!r}: {nearest(words[0], COMMANDS)}")
    if asks_for_help(words):
        kind = _with_settings(words)
        print_command(words[0], kind, SECTIONS if issubclass(kind, Train) else {})
        sys.exit(0)
    words = expand(words)
    return tyro.cli(_with_settings(words), args=words[1:], prog=f"textgym {words[0]}")


def _with_settings(words: Sequence[str]) -> Any:
    """Return the class of a command; that of `train` with the settings of the agent that the command line names."""
    kind = COMMANDS[words[0]]
    if kind is not Train:
        return kind
    config = CONFIGS.get(agent_named(words) or DEFAULT, PPOConfig)  # tyro complains of an unknown one
    settings = ("config", tyro.conf.OmitArgPrefixes[config], field(default_factory=config))  # type: ignore[misc,valid-type]
    with_settings = dataclasses.make_dataclass("Train", [settings], bases=(Train,))
    with_settings.__doc__ = Train.__doc__
    return with_settings
