"""PPO against a learned reward on real prompts, over seeds, beside best-of-16 and supervised fine-tuning.

    python benchmarks/sentiment.py                       # `make bench-demo`: three seeds, up to 15 minutes each
    python benchmarks/sentiment.py --seeds 0 --total-episodes 3072

Every seed trains its own reward model and its own policy, and is measured on held-out prompts. Rows of the table:

* reference: the language model as it is;
* best-of-16: the highest scored of 16 samples of the reference (its KL is the bound log 16 - 15/16);
* SFT: the reference fine-tuned on the train snippets that people rated positive;
* PPO.

`gain` is in deviations of the reference's scores. The judge is the lexicon, which no policy was trained on. Score,
judge, length and diversity stand side by side so that a hacked reward would show.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from rich.console import Console

from textgym.agents.demo import DemoConfig, learn_reward, make_envs, start
from textgym.agents.evaluation import Samples, best_of_n, generate, measure
from textgym.agents.ppo import PPO
from textgym.agents.run_folder import LiveProgress, RunFolder, figures_table
from textgym.agents.sft import SFT, SFTConfig
from textgym.data.prompts import snippet_prompts
from textgym.data.sources import Snippet, movie_snippets
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.functions import lexicon_sentiment


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    total_episodes: int = 4096
    best_of: int = 16
    sft_epochs: int = 2
    jobs: int = 3
    """Seeds that run side by side, each on one thread."""
    output_dir: Path = Path("runs/bench-demo")
    demo: DemoConfig = field(default_factory=lambda: DemoConfig(kl_coef=0.15))


def supervised(config: DemoConfig, snippets: list[Snippet], epochs: int) -> ActorCritic:
    """The reference fine-tuned on the second halves of positive train snippets (rating above 1)."""
    texts = [s.text.split() for s in snippets if s.split == "train" and s.rating > 1]
    halves = [(" ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :])) for words in texts]
    rows = [{"prompt": first, "completion": second} for first, second in halves if first]
    settings = SFTConfig(learning_rate=3e-4, epochs=epochs, seed=config.seed)
    return SFT(ActorCritic.from_pretrained(config.model), rows, config.model, settings).learn().policy


def one_seed(config: Config, seed: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    with LiveProgress(Console(quiet=config.jobs > 1)) as live:
        return measured(config, seed, live)


def measured(config: Config, seed: int, live: LiveProgress) -> dict[str, dict[str, float]]:
    demo = dataclasses.replace(config.demo, seed=seed, total_episodes=config.total_episodes)
    snippets = movie_snippets()
    reward, accuracies = learn_reward(demo, snippets, live)
    folder = RunFolder(config.output_dir / f"seed-{seed}", demo)
    policy, reference = start(demo, reward, folder.folder / "reward_model")
    untrained = copy.deepcopy(policy)
    test = make_envs(demo, reward, snippet_prompts("test"))
    prompts = range(demo.eval_prompts)
    samples: dict[str, Samples] = {"reference": generate(untrained, test, prompts, seed)}
    live.stage(f"seed {seed}: best of {config.best_of}")
    samples[f"best-of-{config.best_of}"] = best_of_n(untrained, test, prompts, config.best_of, 1000 * (seed + 1))
    live.stage(f"seed {seed}: SFT on positive snippets")
    samples["SFT"] = generate(supervised(demo, snippets, config.sft_epochs), test, prompts, seed)
    live.stage(f"seed {seed}: PPO", config.total_episodes)
    PPO(policy, make_envs(demo, reward, snippet_prompts("policy")), demo.ppo).learn(
        config.total_episodes, [folder, live]
    )
    samples["PPO"] = generate(policy, test, prompts, seed)
    live.finish()
    figures = {name: measure(s, reference, lexicon_sentiment) for name, s in samples.items()}
    figures[f"best-of-{config.best_of}"]["kl"] = math.log(config.best_of) - 1 + 1 / config.best_of
    before = figures["reference"]
    for row in figures.values():
        row["reward_model_accuracy"] = accuracies["reward model"]
        row["gain"] = (row["score"] - before["score"]) / before["score_std"]
        row["length_ratio"] = row["length"] / before["length"]
        row["distinct_2_ratio"] = row["distinct_2"] / before["distinct_2"]
        row["judge_gain"] = row["judge"] - before["judge"]
    texts = [transcript["prompt"] for transcript in samples["reference"].transcripts]
    folder.write_samples({name: s.completions for name, s in samples.items()}, texts)
    folder.write_json("evaluation.json", figures)
    folder.draw_curves()
    folder.close()
    return figures


def main(config: Config) -> None:
    console = Console(width=170)
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        seeds = list(pool.map(one_seed, [config] * len(config.seeds), config.seeds))
    for seed, figures in zip(config.seeds, seeds, strict=True):
        console.print(figures_table(f"seed {seed}", figures))
    names = ("gain", "kl", "judge_gain", "distinct_2_ratio", "length_ratio", "reference_ppl", "ended_by_stop")
    summary = {
        method: {name: spread([figures[method][name] for figures in seeds]) for name in names} for method in seeds[0]
    }
    (config.output_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    console.print(f"mean ± deviation over seeds {list(config.seeds)}, {config.demo.eval_prompts} held-out prompts each")
    accuracy = spread([figures["PPO"]["reward_model_accuracy"] for figures in seeds])
    console.print(f"held-out accuracy of the reward models: {accuracy[0]:.3f} ± {accuracy[1]:.3f}")
    console.print("| method | " + " | ".join(names) + " |")
    console.print("| --- " * (len(names) + 1) + "|")
    for method, row in summary.items():
        console.print(f"| {method} | " + " | ".join(f"{mean:.2f} ± {dev:.2f}" for mean, dev in row.values()) + " |")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main(tyro.cli(Config))
