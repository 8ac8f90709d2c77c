"""Train a reward model on human preferences between movie-review snippets, and score a few sentences with it.

    python examples/train_reward_model.py                                       # under a minute on two CPU cores
    python examples/train_reward_model.py --num-snippets 8000 --output-dir runs/reward_model
    python examples/train_reward_model.py --reward-model.learning-rate 1e-3 --reward-model.use-margin

Left out, see examples/ppo_sentiment.py: PPO against a reward model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from textgym.data.corpora.sources import movie_snippets
from textgym.data.preferences import PAIRS_PER_GROUP, heldout_pairs, make_preferences
from textgym.rewards.functions import lexicon_sentiment
from textgym.rewards.models import RewardModelConfig, pairwise_accuracy, train_reward_model


@dataclass
class Args:
    base: str = "tiny"
    """Language model that the reward model is initialised from: 'tiny', 'smollm2', a hub id or a path."""
    num_snippets: int = 4000
    """Number of rated snippets that preferences are made from, at most 8,554."""
    num_heldout_pairs: int = 2000
    """Number of held-out pairs of snippets for the accuracy."""
    output_dir: Path | None = None
    """Folder for the reward model; by default it is not saved."""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(num_layers=2, batch_size=PAIRS_PER_GROUP)
    )


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two OpenMP threads become very slow if another process runs

    # 1. Preferences from human ratings. Snippets of the other splits are held out.
    snippets = movie_snippets()
    train = [snippet for snippet in snippets if snippet.split == "train"][: args.num_snippets]
    heldout = heldout_pairs([s for s in snippets if s.split != "train"], num_pairs=args.num_heldout_pairs)
    preferences = make_preferences(train, seed=args.reward_model.seed)
    print(f"{len(preferences)} comparisons between {len(train)} snippets, for example:\n{preferences[0]}\n")

    # 2. Training with the pairwise loss, -log sigmoid(r_chosen - r_rejected) (Stiennon et al., 2020, section 3.4).
    reward_model, accuracy = train_reward_model(preferences, args.base, config=args.reward_model, heldout=heldout)
    lexicon = pairwise_accuracy(lexicon_sentiment, heldout)
    print(f"held-out pairwise accuracy: reward model {accuracy}\n  of a lexicon: {lexicon}")

    # 3. Calibration: scores of texts like those it will score have mean 0 and standard deviation 1 from here on.
    reward_model.calibrate([snippet.text for snippet in train[:500]])
    completions = ["a joy from start to finish.", "a mess from start to finish.", "two hours long."]
    for completion, score in zip(completions, reward_model(["This film is "] * 3, completions), strict=True):
        print(f"{score:+.2f}  This film is {completion}")

    if args.output_dir is not None:
        reward_model.save_pretrained(args.output_dir, overwrite=True)
        print(f"saved to {args.output_dir}: RewardModel.from_pretrained({str(args.output_dir)!r})")


if __name__ == "__main__":
    main(tyro.cli(Args))
