"""All agents on `textgym/Sentiment-v0` with a learned reward, with the same number of tokens, over several seeds.

    python benchmarks/learning/ladder.py                          # `make bench-demo`: all methods, three seeds
    python benchmarks/learning/ladder.py --methods PPO --seeds 0  # one method; the table has all results in the folder

Each seed trains its own reward model, which all methods share. All agents that sample have the same number of episodes
of the same length and the same KL coefficient beta. All methods are evaluated on held-out prompts.

* reference: the unchanged language model;
* best-of-16: the completion with the highest score of 16 samples of the reference (KL at most log 16 - 15/16; Stiennon
  et al., 2020, appendix G.3);
* SFT: the reference, fine-tuned on the train snippets with a positive rating;
* DPO: trained on pairs of the reference's samples, labelled by the reward model;
* all others learn from their own samples.

`gain` is in standard deviations of the reference's scores, and `objective` is gain - beta KL. The judge is a lexicon,
which no policy was trained on. `seconds` are seconds on one CPU thread. frontier.png plots gain against KL.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from textgym.agents import (
    A2C,
    DPO,
    GRPO,
    NLPO,
    PPO,
    REINFORCE,
    RLOO,
    SFT,
    DPOConfig,
    ExpertIteration,
    SFTConfig,
)
from textgym.agents.runs.demo import DemoConfig, calibrate, learn_reward, make_envs, with_critic
from textgym.agents.runs.evaluation import Samples, generate, measure
from textgym.agents.runs.progress import LiveProgress
from textgym.agents.search.best_of_n import best_of_n
from textgym.data.corpora.sources import movie_snippets
from textgym.data.prompts import snippet_prompts
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.functions import lexicon_sentiment
from textgym.rewards.models import RewardModel

BEST_OF = 16
ONE_STEP = {"episodes_per_update": 64, "learning_rate": 2e-4}
EPOCHS = {"num_epochs": 2, "minibatch_size": 64, "learning_rate": 1e-4}
GROUPS = {**EPOCHS, "group_size": 8}
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "expert iteration": (ExpertIteration, {**GROUPS, "minibatch_size": 16}),
    "REINFORCE": (REINFORCE, {**ONE_STEP, "baseline": "learned"}),
    "A2C": (A2C, ONE_STEP),
    "GRPO": (GRPO, GROUPS),
    "RLOO": (RLOO, GROUPS),
    "NLPO": (NLPO, {**EPOCHS, "value_coef": 0.5}),
    "PPO": (PPO, {**EPOCHS, "value_coef": 0.5}),
}
CRITICS = ("REINFORCE", "A2C", "NLPO", "PPO")
METHODS = ("reference", f"best-of-{BEST_OF}", "SFT", "DPO", *AGENTS)
COLUMNS = ("gain", "kl", "objective", "judge_gain", "distinct_2_ratio", "reference_ppl", "length_ratio", "seconds")


@dataclass
class Args:
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    total_episodes: int = 4096
    """Number of episodes of every agent, 24 tokens each."""
    kl_coef: float = 0.15
    jobs: int = 2
    """Number of concurrent runs, each on one thread."""
    output_dir: Path = Path("runs/ladder")
    settings: str = "{}"
    """Settings of the agents to override, as JSON, for experiments."""

    def demo(self, seed: int) -> DemoConfig:
        return DemoConfig(kl_coef=self.kl_coef, seed=seed)

    def folder(self, seed: int) -> Path:
        return self.output_dir / f"seed-{seed}"


def prepare(args: Args, seed: int) -> None:
    """Train the reward model of a seed, and calibrate its scores on samples of the reference."""
    torch.set_num_threads(1)
    folder, demo = args.folder(seed), args.demo(seed)
    if (folder / "reward_model").exists():
        return
    with LiveProgress(Console(quiet=True)) as live:
        reward, accuracies = learn_reward(demo, movie_snippets(), None, live)
    calibrate(reward, ActorCritic.from_pretrained(demo.model), demo)
    reward.save_pretrained(folder / "reward_model", overwrite=True)
    (folder / "accuracy.json").write_text(json.dumps(accuracies))


def climb(args: Args, method: str, seed: int) -> None:
    """Train and evaluate one method, and write its metrics and samples."""
    torch.set_num_threads(1)
    demo = args.demo(seed)
    reward = RewardModel.from_pretrained(args.folder(seed) / "reward_model")
    started = time.process_time()
    history: list[dict[str, float]] = []
    policy = POLICIES.get(method, online)(args, method, demo, reward, history)
    trained = time.process_time()
    test, prompts = make_envs(demo, reward, snippet_prompts("test")), range(demo.eval_prompts)
    reference = ActorCritic.from_pretrained(demo.model).reference()
    figures: dict[str, Any] = {"seconds": trained - started, "history": history}
    if method.startswith("best-of"):
        samples, figures["curve"] = best_of(policy, test, prompts, seed)
    else:
        samples = generate(policy, test, prompts, seed)
    figures |= measure(samples, reference, lexicon_sentiment)
    if method.startswith("best-of"):
        figures["kl"], figures["seconds"] = bound(BEST_OF), 0.0  # its cost is BEST_OF samples for each text
    figures["samples"] = samples.completions[:8]
    (args.folder(seed) / f"{method}.json").write_text(json.dumps(figures))
    print(f"{method}, seed {seed}: score {figures['score']:.2f}, KL {figures['kl']:.1f}", flush=True)


def online(args: Args, method: str, demo: DemoConfig, reward: RewardModel, history: list[Any]) -> ActorCritic:
    kind, settings = AGENTS[method]
    policy = ActorCritic.from_pretrained(demo.model)
    if method in CRITICS:
        policy = with_critic(demo, reward, args.folder(demo.seed) / "reward_model")
    config = kind.config_class(**{**settings, "seed": demo.seed, **json.loads(args.settings)})
    agent = kind(policy, make_envs(demo, reward, snippet_prompts("policy")), config)
    keep = ("objective/scores", "objective/kl")
    agent.learn(args.total_episodes, [lambda _, metrics: history.append({name: metrics[name] for name in keep})])
    return policy


def untrained(args: Args, method: str, demo: DemoConfig, reward: RewardModel, history: list[Any]) -> ActorCritic:
    return ActorCritic.from_pretrained(demo.model)


def supervised(args: Args, method: str, demo: DemoConfig, reward: RewardModel, history: list[Any]) -> ActorCritic:
    """Train SFT on the second halves of positive train snippets (rating above 1)."""
    texts = [s.text.split() for s in movie_snippets() if s.split == "train" and s.rating > 1]
    halves = [(" ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :])) for words in texts]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in halves if prompt]
    policy = ActorCritic.from_pretrained(demo.model)
    SFT(policy, rows, demo.model, SFTConfig(learning_rate=3e-4, epochs=2, batch_size=32, seed=demo.seed)).learn()
    return policy


def preferred(args: Args, method: str, demo: DemoConfig, reward: RewardModel, history: list[Any]) -> ActorCritic:
    """Train DPO on pairs of the reference's samples, with as many samples as the other agents have episodes."""
    policy = ActorCritic.from_pretrained(demo.model)
    envs = make_envs(demo, reward, snippet_prompts("policy"))
    chosen = np.random.default_rng(demo.seed).integers(len(envs.unwrapped.prompts), size=args.total_episodes // 2)
    samples = generate(policy, envs, np.repeat(chosen, 2).tolist(), demo.seed + 100)
    scores = samples.rollout.raw_scores.tolist()
    pairs = []
    for first in range(0, len(scores), 2):
        better, worse = sorted((first, first + 1), key=lambda row: -scores[row])
        text = [samples.transcripts[row]["completion"] for row in (better, worse)]
        probability = 1 / (1 + math.exp(scores[worse] - scores[better]))
        prompt = samples.transcripts[first]["prompt"]
        pairs.append({"prompt": prompt, "chosen": text[0], "rejected": text[1], "probability": probability})
    labels = {"use_probability": True, "append_eos": False}  # the texts ended at the length limit
    config = DPOConfig(beta=args.kl_coef, learning_rate=1e-4, epochs=2, seed=demo.seed, **labels)
    DPO(policy, pairs, demo.model, config).learn()
    return policy


POLICIES: dict[str, Callable[..., ActorCritic]] = {
    "reference": untrained,
    f"best-of-{BEST_OF}": untrained,
    "SFT": supervised,
    "DPO": preferred,
}


def best_of(policy: ActorCritic, envs: Any, prompts: range, seed: int) -> tuple[Samples, list[tuple[float, float]]]:
    """Return the best of n samples, and KL and mean score of the best of 1, 2, 4, ... samples."""
    rounds = [generate(policy, envs, prompts, 1000 * (seed + 1) + i).rollout.raw_scores for i in range(BEST_OF)]
    scores = torch.stack(rounds)
    sizes = [2**i for i in range(int(math.log2(BEST_OF)) + 1)]
    curve = [(bound(n), float(scores[:n].amax(0).mean())) for n in sizes]
    return best_of_n(policy, envs, prompts, BEST_OF, 1000 * (seed + 1)), curve


def bound(n: int) -> float:
    """Return the upper bound of the KL of best-of-n."""
    return math.log(n) - (n - 1) / n


def _done(args: Args, method: str, seed: int) -> bool:
    return (args.folder(seed) / f"{method}.json").exists()


def figures_of(args: Args, method: str, seed: int) -> dict[str, Any]:
    before, row = (json.loads((args.folder(seed) / f"{name}.json").read_text()) for name in ("reference", method))
    row["gain"] = (row["score"] - before["score"]) / before["score_std"]
    row["objective"] = row["gain"] - args.kl_coef * row["kl"]
    row["judge_gain"] = row["judge"] - before["judge"]
    for name in ("length", "distinct_2"):
        row[f"{name}_ratio"] = row[name] / before[name]
    to_gain = [(kl, (score - before["score"]) / before["score_std"]) for kl, score in row.get("curve", ())]
    row["curve"] = to_gain or [
        (step["objective/kl"], (step["objective/scores"] - before["score"]) / before["score_std"])
        for step in row["history"]
    ]
    return row


def draw(figures: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot gain against KL: for each agent during training (own samples, mean over seeds) and at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for index, (method, rows) in enumerate(figures.items()):
        color, marker = f"C{index % 10}", "o" if index < 10 else "s"
        curve = np.mean([row["curve"] for row in rows], axis=0) if rows[0]["curve"] else np.zeros((0, 2))
        width = 5 if len(curve) > 12 else 1
        smooth = [np.convolve(curve[:, i], np.ones(width) / width, "valid") for i in (0, 1)] if len(curve) else [[], []]
        axis.plot(*smooth, color=color, linewidth=1.2, linestyle="--" if method.startswith("best-of") else "-")
        points = [[row[name] for row in rows] for name in ("kl", "gain")]
        axis.plot(*map(np.mean, points), marker, color=color, markersize=9, label=method)
        axis.plot(*points, marker, color=color, markersize=4, alpha=0.4)
    kl = np.linspace(0, axis.get_xlim()[1], 200)
    bottom, top = axis.get_ylim()
    axis.plot(kl, np.sqrt(2 * kl), ":", color="grey", label="sqrt(2 KL), normal scores")
    axis.set(xlabel="KL to the reference, nats per text", ylabel="gain, standard deviations of the reference's scores")
    axis.set_ylim(bottom, top + 0.5)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(prepare, [args] * len(args.seeds), args.seeds))
        jobs = [(args, method, seed) for seed in args.seeds for method in args.methods]
        if "reference" not in args.methods:  # all others are compared with it
            jobs += [(args, "reference", seed) for seed in args.seeds if not _done(args, "reference", seed)]
        list(pool.map(climb, *zip(*jobs, strict=True)))
    there = [method for method in METHODS if all(_done(args, method, seed) for seed in args.seeds)]
    figures = {method: [figures_of(args, method, seed) for seed in args.seeds] for method in there}
    accuracy = [json.loads((args.folder(seed) / "accuracy.json").read_text())["reward model"] for seed in args.seeds]
    print(f"\nseeds {list(args.seeds)}; held-out accuracy of the reward models: {spread(accuracy)}")
    print("| method | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (len(COLUMNS) + 1) + "|")
    for method, rows in figures.items():
        print(f"| {method} | " + " | ".join(spread([row[name] for row in rows]) for name in COLUMNS) + " |")
    draw(figures, args.output_dir / "frontier.png")


def spread(values: list[float]) -> str:
    """Return the mean and the sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main(tyro.cli(Args))
