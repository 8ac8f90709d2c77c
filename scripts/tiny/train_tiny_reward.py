"""Train the embedded reward model on the embedded language model's trunk; write `textgym/models/assets/tiny_reward`.

    python scripts/tiny/train_tiny_reward.py                            # the shipped model: one CPU core, a minute
    python scripts/tiny/train_tiny_reward.py --reward-model.epochs 0.1 --output-dir runs/tiny_reward    # a trial

Preferences come from the human ratings of the train split; accuracy is on pairs of the other two splits. Gain and
bias are calibrated on the reference's completions of the bundled openings, so that the score of
`textgym/Sentiment-v0` has mean 0 and standard deviation 1 before training. Metrics are written to `figures.json`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro

from textgym.agents.runs.evaluation import generate
from textgym.data.corpora.sources import Snippet, movie_snippets
from textgym.data.preferences import PAIRS_PER_GROUP, heldout_pairs, make_preferences
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.functions import lexicon_sentiment
from textgym.rewards.models import RewardModel, RewardModelConfig, pairwise_accuracy, train_reward_model


@dataclass
class Config:
    base: str = "tiny"
    output_dir: Path = Path("textgym/models/assets/tiny_reward")
    calibration_samples: int = 1000
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(num_layers=2, batch_size=PAIRS_PER_GROUP)
    )


def main(config: Config) -> None:
    torch.set_num_threads(1)
    snippets = movie_snippets()
    seen, unseen = ([s for s in snippets if (s.split == "train") == train] for train in (True, False))
    heldout = heldout_pairs(unseen)
    started = time.process_time()
    reward_model, accuracy = train_reward_model(
        make_preferences(seen, seed=config.reward_model.seed), config.base, config=config.reward_model, heldout=heldout
    )
    minutes = (time.process_time() - started) / 60
    reward_model.calibrate(reference_samples(config, reward_model))
    reward_model.model.half()
    reward_model.save_pretrained(config.output_dir, overwrite=True)
    shipped = RewardModel.from_pretrained(config.output_dir)
    figures = {
        "accuracy": round(pairwise_accuracy(shipped, heldout), 4),
        "accuracy_before_fp16": round(accuracy, 4),
        "accuracy_lexicon": round(pairwise_accuracy(lexicon_sentiment, heldout), 4),
        "correlation_with_ratings": round(correlation(shipped, unseen), 3),
        "heldout": f"{len(heldout)} pairs of {len(unseen)} snippets, rating gap above 1",
        "trained_on": f"{len(seen)} snippets",
        "calibrated_on": f"{config.calibration_samples} completions of the bundled openings by the reference model",
        "cpu_minutes": round(minutes, 1),
        "config": {name: str(value) for name, value in asdict(config.reward_model).items()},
    }
    (config.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def reference_samples(config: Config, reward_model: RewardModel) -> list[str]:
    """Return prompts with completions, as `textgym/Sentiment-v0` passes them to the reward model."""
    models: dict[str, Any] = {"tokenizer": config.base, "reference": config.base, "reward": reward_model}
    envs = gym.make_vec("textgym/Sentiment-v0", 50, kl_mode="deferred", array="torch", **models)
    num_prompts = len(envs.unwrapped.task.rows)  # type: ignore[attr-defined]
    indices = [index % num_prompts for index in range(config.calibration_samples)]
    samples = generate(ActorCritic.from_pretrained(config.base), envs, indices, seed=config.reward_model.seed)
    return [transcript["prompt"] + transcript["completion"] for transcript in samples.transcripts]


def correlation(reward_model: RewardModel, snippets: list[Snippet]) -> float:
    """Return the Pearson correlation of scores and human ratings."""
    scores = reward_model.score_texts([snippet.text for snippet in snippets]).numpy()
    return float(np.corrcoef(scores, [snippet.rating for snippet in snippets])[0, 1])


if __name__ == "__main__":
    main(tyro.cli(Config))
