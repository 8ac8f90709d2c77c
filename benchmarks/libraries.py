"""Agents of other libraries, as in examples/: scores before and after training.

    python benchmarks/libraries.py                         # all of them, a minute or two each on one thread
    python benchmarks/libraries.py --rows sb3-dqn sbx

`score` is the reward model's score. `return` is the sum of the environment's rewards: the score plus 0.05 log pi_ref of
each token, the reference's part of the KL penalty. All rows are evaluated by `textgym.testing.play` with 256 episodes
on the 200 training prompts in order, repeated as needed; the standard error is over prompts. Each row is one run
with one seed. Policies are sampled from, and DQN is greedy. Libraries that are not installed are marked as absent.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from textgym.testing import mean_and_error, play

MLP, TOKENS = "`textgym/SentimentMLP-v0`", "`textgym/Sentiment-v0`"
HEADER = ("library", "algorithm", "environment", "steps", "score", "after", "return", "after", "CPU minutes")


@dataclass(frozen=True)
class Row:
    """An agent of another library.

    Attributes:
        library: Name of the library and of its package on PyPI.
        algorithm: Name of the algorithm.
        environment: Id of the environment.
        example: Name of the file in examples/ that trains it.
        settings: Arguments of the example.
    """

    library: str
    algorithm: str
    environment: str
    example: str
    settings: dict[str, Any]


ROWS = {
    "sb3-ppo": Row("stable-baselines3", "PPO", MLP, "sb3_mlp", {"algorithm": "PPO"}),
    "sb3-a2c": Row("stable-baselines3", "A2C", MLP, "sb3_mlp", {"algorithm": "A2C"}),
    "sb3-dqn": Row("stable-baselines3", "DQN", MLP, "sb3_mlp", {"algorithm": "DQN"}),
    "sbx": Row("sbx-rl", "PPO", MLP, "sbx_ppo", {}),
    "tianshou": Row("tianshou", "PPO", MLP, "tianshou_ppo", {}),
    "torchrl": Row("torchrl", "PPO", MLP, "torchrl_ppo", {}),
    "rllib": Row("ray", "PPO", MLP, "rllib_ppo", {}),
    "cleanrl": Row("none (CleanRL's form)", "PPO", TOKENS, "cleanrl_loop", {}),
}
MODULES = {"stable-baselines3": "stable_baselines3", "sbx-rl": "sbx"}
"""Module of each package whose module has another name."""


@dataclass
class Config:
    """Settings of the benchmark."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Names of rows."""
    total_timesteps: int | None = None
    """Number of environment steps in training; by default each example's own number."""
    episodes: int = 256
    """Number of episodes of the evaluation before and after training."""


def run(row: Row, config: Config) -> list[str]:
    """Return the cells of a row."""
    library, settings = row.library, {**row.settings, "eval_episodes": config.episodes}
    if row.example != "cleanrl_loop":
        if importlib.util.find_spec(MODULES.get(library, library)) is None:
            return [library, row.algorithm, row.environment, f"absent: `pip install {library}`", *[""] * 5]
        library = f"{library} {version(library)}"
    if config.total_timesteps is not None:
        settings["total_timesteps"] = config.total_timesteps
    example = load(row.example)
    args, start = example.Args(**settings), time.process_time()
    before, after = example.main(args)
    minutes = (time.process_time() - start) / 60
    values = (before.scores, after.scores, before.returns, after.returns)
    figures = [mean_and_error(each, before.prompts) for each in values]
    return [library, row.algorithm, row.environment, f"{args.total_timesteps:,}", *figures, f"{minutes:.1f}"]


def likeliest(config: Config) -> list[str]:
    """Return the row of an untrained agent that always chooses the most likely token."""
    played = play("textgym/SentimentMLP-v0", lambda observations: np.zeros(len(observations), int), config.episodes)
    return [
        "none",
        "always the most likely token",
        MLP,
        "0",
        str(played),
        "",
        mean_and_error(played.returns, played.prompts),
        "",
        "0.0",
    ]


def load(name: str) -> Any:
    """Import an example as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


def main(config: Config) -> None:
    """Print the table, each row as soon as it is known; examples also print a line."""
    torch.set_num_threads(1)
    rows = (run(ROWS[name], config) for name in config.rows)
    for cells in itertools.chain([HEADER, ["---"] * len(HEADER), likeliest(config)], rows):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
