"""What the scripts that record whole updates of TRL's trainers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLAIN: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
"""Arguments of a trainer in float32 on the CPU that saves and reports nothing."""


def flat(model: Any) -> Tensor:
    """Return a copy of all weights of a model in one vector."""
    return torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
