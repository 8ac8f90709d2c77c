"""Record the losses of TRL's GRPOTrainer and RLOOTrainer on given log-probs, for comparison in tests/agents.

    pip install --target .peers --no-deps trl==1.16.0 && pip install --target .peers datasets
    python scripts/peers/record_group_losses.py --trl .peers

TRL is not a dependency, so its numbers are stored in tests/agents/trl/group_losses.json.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro

OUTPUT = Path(__file__).parents[2] / "tests" / "agents" / "trl" / "group_losses.json"
LENGTHS, WIDTH, LONGEST = (3, 5, 1, 4), 5, 6


@dataclass
class Args:
    trl: Path
    """Folder with the package `trl` and the packages that it imports."""


def stub(tokens: dict[str, torch.Tensor], **settings: Any) -> Any:
    """Attributes and methods of a trainer that `_compute_loss` uses, with a model whose log-probs are given."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x, num_processes=1)
    defaults: dict[str, Any] = {
        "accelerator": same,
        "model": SimpleNamespace(training=True),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (tokens["new"], torch.zeros(4, WIDTH), None),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "epsilon_low": 0.2,
    }
    return SimpleNamespace(**{**defaults, **settings})


def inputs(tokens: dict[str, torch.Tensor]) -> dict[str, Any]:
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, WIDTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": tokens["advantages"],
        "old_per_token_logps": tokens["old"],
        "ref_per_token_logps": tokens["reference"],
        "old_logps": (tokens["old"] * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }


def main(args: Args) -> None:
    sys.path.insert(0, str(args.trl))
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    rng = torch.Generator().manual_seed(0)
    new = -torch.rand(4, WIDTH, generator=rng) - 0.5
    tokens = {
        "new": new,
        "old": new + 0.3 * torch.randn(4, WIDTH, generator=rng),
        "reference": new + 0.5 * torch.randn(4, WIDTH, generator=rng),
        "advantages": torch.randn(4, generator=rng),
    }
    cases = []
    for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo"):
        for beta, unbiased in ((0.0, False), (0.1, False), (0.1, True)):
            settings = SimpleNamespace(delta=None, use_bias_correction_kl=unbiased, steps_per_generation=1)
            trainer = stub(tokens, loss_type=loss_type, beta=beta, args=settings, epsilon_high=0.28)
            loss = float(GRPOTrainer._compute_loss(trainer, None, inputs(tokens)))
            cases.append({"loss_type": loss_type, "beta": beta, "exact": unbiased, "loss": loss})
    # GSPO, CISPO, and a loss of the tokens with high entropy alone, with the gradients of the log-probs.
    entropies = torch.rand(4, WIDTH, generator=rng)
    variants = []
    for name, settings in (
        ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.28}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 1.28}),
        ("entropy", {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.4}),
    ):
        moving = tokens["new"].clone().requires_grad_()
        trainer = stub(tokens, beta=0.0, **settings)
        trainer._get_per_token_logps_and_entropies = lambda *_, new=moving, **__: (new, entropies, None)
        trainer.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, trainer)
        trainer.accelerator.pad_across_processes = lambda x, **_: x
        loss = GRPOTrainer._compute_loss(trainer, None, inputs(tokens))
        (gradient,) = torch.autograd.grad(loss, moving)
        variants.append({"name": name, "loss": float(loss), "gradient": gradient.tolist()})
    rloo = float(RLOOTrainer._compute_loss(stub(tokens, epsilon_high=0.2), None, inputs(tokens)))
    record = {
        "trl": trl.__version__,
        "lengths": LENGTHS,
        "longest": LONGEST,
        **{name: values.tolist() for name, values in tokens.items()},
        "grpo": cases,
        "entropies": entropies.tolist(),
        "variants": variants,
        "rloo": rloo,
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(cases) + len(variants) + 1} losses of TRL {trl.__version__}: {OUTPUT}")


if __name__ == "__main__":
    main(tyro.cli(Args))
