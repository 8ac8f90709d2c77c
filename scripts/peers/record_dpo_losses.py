"""Record the losses of TRL's DPOTrainer on given log-probs, for comparison in tests/agents.

    pip install --target .peers --no-deps trl==1.16.0 && pip install --target .peers datasets
    python scripts/peers/record_dpo_losses.py --trl .peers

TRL is not a dependency, so its numbers are stored in tests/agents/trl/dpo_losses.json. Its "sigmoid" has no label
smoothing, but "aot" does; on one pair at a time "aot" equals "sigmoid", because it differs only by sorting pairs.
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

OUTPUT = Path(__file__).parents[2] / "tests" / "agents" / "trl" / "dpo_losses.json"
PAIRS, WIDTH = 4, 6
LENGTHS = torch.tensor([3, 6, 1, 4, 5, 2, 1, 6])  # of the chosen responses, then of the rejected ones
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass
class Args:
    trl: Path
    """Folder with the package `trl` and the packages that it imports."""


def stub(loss: str, beta: float, label_smoothing: float) -> Any:
    """Attributes and methods of a trainer that `_compute_loss` uses."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=beta,
        loss_types=[loss],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def computed(kind: Any, tokens: dict[str, torch.Tensor], pairs: list[int], trainer: Any) -> float:
    """Return the loss of some of the pairs."""
    rows = torch.tensor([*pairs, *(PAIRS + pair for pair in pairs)])
    mask = tokens["mask"][rows]
    reference = (tokens["reference"] * tokens["mask"]).sum(1)[rows]
    nothing = torch.zeros(mask.shape)
    outputs = SimpleNamespace(
        log_probs=tokens["policy"][rows] * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    first = torch.zeros(len(rows), 1, dtype=torch.long)  # the prompt
    inputs = {
        "input_ids": torch.zeros(len(rows), 1 + WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(len(rows), 1 + WIDTH, dtype=torch.long),
        "completion_mask": torch.cat([first, mask], 1),
        "ref_chosen_logps": reference[: len(pairs)],
        "ref_rejected_logps": reference[len(pairs) :],
    }
    return float(kind._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False))


def main(args: Args) -> None:
    sys.path.insert(0, str(args.trl))
    import trl
    from trl.trainer.dpo_trainer import DPOTrainer

    rng = torch.Generator().manual_seed(0)
    policy = -torch.rand(2 * PAIRS, WIDTH, generator=rng) - 0.5
    tokens = {
        "policy": policy,
        "reference": policy + 0.5 * torch.randn(2 * PAIRS, WIDTH, generator=rng),
        "mask": (torch.arange(WIDTH) < LENGTHS[:, None]).long(),
    }
    cases = []
    for loss, theirs, beta, smoothing in (
        ("sigmoid", "sigmoid", 0.1, 0.0),
        ("sigmoid", "sigmoid", 1.5, 0.0),
        ("hinge", "hinge", 0.1, 0.0),
        ("hinge", "hinge", 1.5, 0.0),
        ("ipo", "ipo", 0.1, 0.0),
        ("ipo", "ipo", 1.5, 0.0),
        ("sigmoid", "aot", 0.1, 0.2),
        ("sigmoid", "aot", 1.5, 0.2),
    ):
        trainer = stub(theirs, beta, smoothing)
        batches = [[pair] for pair in range(PAIRS)] if theirs == "aot" else [list(range(PAIRS))]
        losses = [computed(DPOTrainer, tokens, pairs, trainer) for pairs in batches]
        rewards = {name: sum(trainer._metrics["train"][name]) / len(batches) for name in REWARDS}
        case = {"loss": loss, "theirs": theirs, "beta": beta, "label_smoothing": smoothing}
        cases.append({**case, "value": sum(losses) / len(losses), "rewards": rewards})
    record = {"trl": trl.__version__, "lengths": LENGTHS.tolist(), "cases": cases}
    record |= {name: tokens[name].tolist() for name in ("policy", "reference")}
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(cases)} losses of TRL {trl.__version__}: {OUTPUT}")


if __name__ == "__main__":
    main(tyro.cli(Args))
