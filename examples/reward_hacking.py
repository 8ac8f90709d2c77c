"""Reward hacking, and how the KL penalty prevents it: the same PPO run with beta = 0, too small, and large enough.

    python examples/reward_hacking.py                                # one seed, a few minutes on one core
    python examples/reward_hacking.py --seeds 0 1 2 --jobs 2         # the table in docs/results.md

Without a penalty the reward model's score rises while the texts become unreadable (Gao et al., 2023). With a large
enough penalty the score rises less and the texts stay readable. The judge is the VADER lexicon, which no policy is
trained on. Prompts are first halves of movie-review snippets, which are downloaded on first use.
"""

from __future__ import annotations

import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import gymnasium as gym
import torch
import tyro

import textgym  # noqa: F401  (registers the ids)
from textgym import ActorCritic
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.evaluation import generate, measure
from textgym.data.prompts import snippet_prompts
from textgym.rewards.functions import lexicon_sentiment

METRICS = ("score", "judge", "kl", "reference_ppl", "distinct_2")
Curve = list[dict[str, float]]


@dataclass
class Args:
    kl_coefs: tuple[float, ...] = (0.0, 0.03, 0.15)
    """beta of each run: none, too small, large enough."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the runs of each beta."""
    total_episodes: int = 4096
    """Number of training episodes of a run."""
    num_envs: int = 64
    """Number of rows of the environment."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    eval_prompts: int = 128
    """Number of held-out prompts for evaluation."""
    eval_every: int = 4
    """Number of updates between evaluations."""
    completions: int = 2
    """Number of completions to print for each beta."""
    jobs: int = 1
    """Number of concurrent runs, each on one thread."""
    output_dir: Path = Path("runs/reward_hacking")
    """Folder for the curves."""


def run(args: Args, kl_coef: float, seed: int) -> tuple[Curve, list[str]]:
    """Run PPO; return its metrics on held-out prompts during training, and completions after it."""
    torch.set_num_threads(1)  # two OpenMP threads become very slow if another process runs
    envs, test = (
        gym.make_vec(
            "textgym/Sentiment-v0",
            num_envs=args.num_envs,
            prompts=snippet_prompts(split),
            kl_coef=kl_coef,
            kl_mode="deferred",  # PPO applies the KL penalty
            min_new_tokens=24,  # all texts have the same length, so that length cannot be a way to raise the score
        )
        for split in ("policy", "test")
    )
    policy = ActorCritic.from_pretrained("tiny")
    reference = policy.reference()
    curve: Curve = []

    def evaluate(episodes: int) -> list[str]:
        state = policy.generator.get_state()  # restored below, so that evaluation does not change the training run
        samples = generate(policy, test, range(args.eval_prompts), seed)
        policy.generator.set_state(state)
        curve.append({"episodes": episodes, **measure(samples, reference, lexicon_sentiment)})
        return [f"{row['prompt']} >{row['completion']}" for row in samples.transcripts[: args.completions]]

    config = PPOConfig(
        episodes_per_update=2 * args.num_envs,
        learning_rate=args.learning_rate,
        minibatch_size=64,
        value_coef=0.5,
        seed=seed,
    )
    agent = PPO(policy, envs, config)
    evaluate(0)

    def watch(agent: PPO, metrics: dict[str, float]) -> None:
        if agent.updates % args.eval_every == 0 and agent.episodes < args.total_episodes:
            evaluate(agent.episodes)

    agent.learn(args.total_episodes, [watch])
    return curve, evaluate(agent.episodes)


def draw(curves: dict[float, list[Curve]], path: Path) -> None:
    """Plot each metric in a panel, with a line for each beta: the mean over seeds, and the range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        for kl_coef, runs in curves.items():
            episodes = [row["episodes"] for row in runs[0]]
            values = [[row[name] for row in points] for points in zip(*runs, strict=True)]
            axis.plot(episodes, [statistics.mean(v) for v in values], label=f"beta = {kl_coef:g}")
            axis.fill_between(episodes, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
        axis.set(title=name, xlabel="episodes")
        if name == "reference_ppl":
            axis.set_yscale("log")
    axis.legend()
    temporary = path.with_name(f".{os.getpid()}.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(kl_coef, seed) for kl_coef in args.kl_coefs for seed in args.seeds]
    if args.jobs == 1:
        results = [run(args, *job) for job in jobs]
    else:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(run, [args] * len(jobs), *zip(*jobs, strict=True)))
    curves = {beta: [results[i][0] for i, job in enumerate(jobs) if job[0] == beta] for beta in args.kl_coefs}
    (args.output_dir / "curves.json").write_text(json.dumps({str(beta): runs for beta, runs in curves.items()}))
    draw(curves, args.output_dir / "curves.png")

    rows = {"reference": [runs[0] for runs in curves[args.kl_coefs[0]]]}
    rows |= {f"beta = {beta:g}": [run[-1] for run in runs] for beta, runs in curves.items()}
    print("| | " + " | ".join(METRICS) + " |\n" + "| --- " * (len(METRICS) + 1) + "|")
    for name, ends in rows.items():
        cells = [_mean_and_std([end[metric] for end in ends]) for metric in METRICS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for beta in args.kl_coefs:
        texts = results[jobs.index((beta, args.seeds[0]))][1]
        print(f"\nbeta = {beta:g}\n  " + "\n  ".join(texts))
    print(f"\ncurves: {args.output_dir / 'curves.png'}")


def _mean_and_std(values: list[float]) -> str:
    std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) + 0.0:.2f}{std}"  # + 0.0 turns -0.0 into 0.0


if __name__ == "__main__":
    main(tyro.cli(Args))
