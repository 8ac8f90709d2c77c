"""Whether the default commands learn without collapsing: the critic, the size of steps, length and diversity.

    python benchmarks/learning/defaults.py                                    # 4,096 episodes, seeds 1 to 3
    python benchmarks/learning/defaults.py --total-episodes 1024 --seeds 1

Runs SB3's PPO with the settings of the README, and `textgym train` as the README does, once for each seed. Explained
variances are means over the last quarter of the updates, clip fraction and approximate KL are the largest of an update,
and the length and distinct-2 of responses to held-out prompts are divided by those before training.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro
from stable_baselines3 import PPO

from textgym.cli import main as textgym
from textgym.sb3 import EpisodeRolloutBuffer, KLCallback, TextActorCriticPolicy, make_vec_env

Figures = dict[str, float]


@dataclass
class Args:
    total_episodes: int = 4096
    """Episodes of `textgym train`."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds; each has a run of its own."""
    sb3_timesteps: int = 512
    """Timesteps of SB3's PPO: at least 256, those of one rollout."""
    flags: str = ""
    """Further flags of `textgym train`, to compare with the defaults, in quotes: `--flags="--kl-coef 0.15"`."""


def main(args: Args) -> None:
    torch.set_num_threads(1)
    show("SB3's PPO", args, train_sb3)
    show("textgym train", args, train)


def train(args: Args, seed: int) -> Figures:
    """Run `textgym train`, and return its metrics at the end."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        episodes = str(args.total_episodes)
        flags = ["--total-episodes", episodes, "--output-dir", str(folder), "--seed", str(seed), "--quiet"]
        textgym(["train", *flags, *shlex.split(args.flags)])
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        evaluation = json.loads((folder / "evaluation.json").read_text())
    before, after = evaluation["before"], evaluation["after"]
    last = rows[-max(len(rows) // 4, 1) :]

    def at_the_end(name: str) -> float:
        return fmean(row[name] for row in last if name in row)

    return {
        "explained variance": at_the_end("val/explained_variance"),
        "within prompts": at_the_end("val/explained_variance_within_prompts"),
        "clip fraction": max(row["policy/clipfrac_avg"] for row in rows),
        "approximate KL": max(row["policy/approxkl_avg"] for row in rows),
        "KL": after["kl"],
        "gain": after["score"] - before["score"],
        "length ratio": after["length"] / before["length"],
        "distinct-2 ratio": after["distinct_2"] / before["distinct_2"],
        "CPU seconds": time.process_time() - started,
    }


def train_sb3(args: Args, seed: int) -> Figures:
    """Run SB3's PPO with the settings of the README, and return the size of its steps."""
    env = make_vec_env("textgym/Sentiment-v0", n_envs=16, max_new_tokens=8)
    model = PPO(
        TextActorCriticPolicy,
        env,
        n_steps=16,
        batch_size=256,
        n_epochs=2,
        learning_rate=1e-4,
        gamma=1.0,
        policy_kwargs={"model": "tiny"},
        rollout_buffer_class=EpisodeRolloutBuffer,
        rollout_buffer_kwargs={"reference": "tiny", "kl_coef": 0.05},
        seed=seed,
    )
    steps: list[Figures] = []
    names = {"clip fraction": "train/clip_fraction", "approximate KL": "train/approx_kl"}
    rollout = 16 * env.num_envs  # timesteps
    for _ in range(args.sb3_timesteps // rollout):
        model.learn(rollout, KLCallback(), reset_num_timesteps=False)
        steps.append({title: float(model.logger.name_to_value[name]) for title, name in names.items()})
    return {title: max(step[title] for step in steps) for title in names}


def show(title: str, args: Args, run: Callable[[Args, int], Figures]) -> None:
    """Print a table in Markdown, with a row for each seed as soon as its run has ended."""
    for number, seed in enumerate(args.seeds):
        figures = run(args, seed)
        if number == 0:
            print(f"\n| {title}, seed | {' | '.join(figures)} |\n{'| --- ' * (len(figures) + 1)}|")
        print(f"| {seed} | {' | '.join(f'{figure:.3g}' for figure in figures.values())} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
