"""Record the loss of TRL's RewardTrainer on given scores, for comparison in test_pairwise.py.

    pip install --target .peers --no-deps trl==1.16.0 && pip install --target .peers datasets
    python scripts/peers/record_reward_loss.py --trl .peers

TRL is not a dependency, so its numbers are stored in tests/textgym/rewards/models/trl_reward_loss.json.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro

OUTPUT = Path(__file__).parents[2] / "tests" / "textgym" / "rewards" / "models" / "trl_reward_loss.json"


@dataclass
class Args:
    trl: Path
    """Folder with the package `trl` and the packages that it imports."""


def trl_loss(trainer_class: Any, scores: torch.Tensor, margin: list[float] | None, center: float | None) -> float:
    """Return the loss of TRL's `compute_loss`, with a model that returns these scores, those of chosen texts first."""
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(logits=scores[:, None])

    inputs: dict[str, Any] = {"attention_mask": torch.ones(len(scores), 1)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin)
    return float(trainer_class.compute_loss(trainer, model, inputs))


def main(args: Args) -> None:
    sys.path.insert(0, str(args.trl))
    import trl
    from trl.trainer.reward_trainer import RewardTrainer

    generator = torch.Generator().manual_seed(0)
    cases = []
    for margin in (None, [0.5, 0.0, 2.0, 1.25, 3.0]):
        for center in (None, 0.01, 0.3):
            scores = 3 * torch.randn(10, generator=generator)
            loss = trl_loss(RewardTrainer, scores, margin, center)
            cases.append({"scores": scores.tolist(), "margin": margin, "center_coefficient": center, "loss": loss})
    OUTPUT.write_text(json.dumps({"trl": trl.__version__, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} losses of TRL {trl.__version__}: {OUTPUT}")


if __name__ == "__main__":
    main(tyro.cli(Args))
