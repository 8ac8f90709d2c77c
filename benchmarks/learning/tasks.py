"""All tasks: metrics of the embedded model on held-out prompts before and after PPO, with 95% confidence intervals.

    python benchmarks/learning/tasks.py                       # all tasks, a few minutes each on one thread
    python benchmarks/learning/tasks.py --tasks Copy Answer --episodes 2048

The embedded model has 2.2M parameters and was trained only on short reviews and chats, so it can neither answer
questions nor translate German. Tasks with reference answers are therefore trained like "supervised + RL" of RL4LMs
(Ramamurthy et al., 2022): SFT on the split `train`, then PPO with the SFT model as reference. The toy tasks start with
PPO.

Training prompts are of the split `train`, and the evaluation has 256 completions of prompts of the split `test`. Tasks
that ignore the prompt have no splits, and `Answer` has 25 questions, each answered ten times. The first metric of a
task is its reward, or the main part of it. Gains are paired: the same prompts and seeds. Minutes are minutes on one CPU
thread. `textgym/Enumerable-v0` has its own vocabulary of 12 tokens and starts from a random model. Texts of tasks are
downloaded on first use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import torch
import tyro

from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.agents.runs.evaluation import Interval, Samples, generate, score_gains, score_intervals
from textgym.envs.tasks.enumerable import VOCAB_SIZE
from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.registration import TASKS
from textgym.testing import mock_lm

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Sums of two digits. There are so few that larger splits would leave no prompts for the evaluation."""
ARGUMENTS: dict[str, dict[str, Any]] = {"ReasoningGym": {"task": "chain_sum", "size": 100, "config": SUMS}}
NO_SPLITS = ("IncreasingNumbers", "Dates", "Enumerable")
NO_SFT = (*NO_SPLITS, "Copy")
EPOCHS = 4
"""Maximum number of epochs of SFT: more would memorise small sets, and leave nothing for PPO to improve."""


@dataclass
class Config:
    """Settings of the benchmark."""

    tasks: tuple[str, ...] = tuple(name for name in TASKS if name != "Sentiment")
    """Names of tasks; the sentiment task is in `textgym demo`."""
    episodes: int = 4096
    """Number of episodes of PPO for each task."""
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(max_steps=100, learning_rate=5e-4, allow_faulty_rows=0.2))
    """Settings of SFT before PPO, on tasks with reference answers; some texts are longer than "tiny" has positions."""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(learning_rate=3e-4, entropy_coef=0.01))
    """Settings of PPO."""
    completions: int = 256
    """Number of completions in the evaluation of each stage."""


@dataclass
class Run:
    """Samples of a policy after each stage: `"untrained"`, `"SFT"` on some tasks, and `"PPO"`."""

    name: str
    metrics: tuple[Any, ...]
    stages: dict[str, Samples]
    episodes: int
    minutes: float

    def gains(self, since: str) -> dict[str, Interval]:
        """Return the gains of PPO over an earlier stage."""
        return score_gains(self.stages[since], self.stages["PPO"], self.metrics)

    def rows(self) -> list[str]:
        """Return a row for each metric."""
        figures = {stage: score_intervals(samples, self.metrics) for stage, samples in self.stages.items()}
        gains = {since: self.gains(since) for since in self.stages if since != "PPO"}

        def cell(of: Mapping[str, dict[str, Interval]], key: str, metric: str) -> str:
            return str(of[key][metric]) if key in of else "-"

        return [
            f"| {self.name} | {metric} | "
            + " | ".join(cell(figures, stage, metric) for stage in ("untrained", "SFT", "PPO"))
            + " | "
            + " | ".join(cell(gains, since, metric) for since in ("untrained", "SFT"))
            + f" | {self.episodes:,} | {self.minutes:.1f} |"
            for metric in figures["PPO"]
        ]


HEADER = (
    "| task | metric | untrained | after SFT | after PPO | PPO - untrained | PPO - SFT | episodes | minutes |\n"
    + "| --- " * 9
    + "|"
)


def run(name: str, config: Config) -> Run:
    """Train and evaluate on a task."""
    start = time.process_time()
    policy = ActorCritic.from_pretrained(
        mock_lm(VOCAB_SIZE, initializer_range=0.02) if name == "Enumerable" else "tiny"
    )
    test = make_envs(name, "test")
    prompts = [index % len(test.unwrapped.prompts) for index in range(config.completions)]
    stages = {"untrained": generate(policy, test, prompts, config.ppo.seed)}
    train = make_envs(name, "train")
    if name not in NO_SFT:
        examples = answers(train.unwrapped.prompts)
        few = math.ceil(EPOCHS * len(examples) / config.sft.batch_size)
        SFT(policy, examples, config=replace(config.sft, max_steps=min(few, config.sft.max_steps or few))).learn()
        stages["SFT"] = generate(policy, test, prompts, config.ppo.seed)
        train = make_envs(name, "train", policy.reference())
    agent = PPO(policy, train, config.ppo).learn(config.episodes)
    stages["PPO"] = generate(policy, test, prompts, config.ppo.seed)
    return Run(name, test.unwrapped.metrics, stages, agent.episodes, (time.process_time() - start) / 60)


def make_envs(name: str, split: str, reference: TokenModel | None = None) -> Any:
    """Make an environment with 64 rows of a task; with a reference for the KL penalty in training."""
    arguments = {"kl_mode": "deferred", "array": "torch", **ARGUMENTS.get(name, {})}
    arguments |= {} if name in NO_SPLITS else {"split": split}
    arguments |= {} if reference is None else {"reference": reference}
    return gym.make_vec(f"textgym/{name}-v0", 64, **arguments)


def answers(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return examples for SFT: each prompt with its first reference or its answer."""
    return [{"prompt": row["prompt"], "completion": f" {first_answer(row)}"} for row in rows]


def first_answer(row: dict[str, Any]) -> str:
    """Return the target text of SFT."""
    wanted = row.get("references", row.get("answer"))
    return wanted if isinstance(wanted, str) else wanted[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = tyro.cli(Config)
    print(HEADER, flush=True)
    for name in config.tasks:
        print("\n".join(run(name, config).rows()), flush=True)
