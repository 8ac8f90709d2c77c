"""GRPO's and RLOO's losses equal TRL 1.16's own numbers, recorded by scripts/peers/record_group_losses.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from textgym.agents import GRPO, RLOO, GRPOConfig, RLOOConfig
from textgym.agents.common.policy_gradient import Batch
from textgym.models.actor_critic import Evaluation
from textgym.models.sequences import Sequences
from textgym.rewards.kl import KLPenalty
from textgym.testing import mock_lm, tolerance

pytestmark = pytest.mark.numerics

TRL = json.loads(Path(__file__).with_name("group_losses.json").read_text())
NEW, OLD, REFERENCE = (torch.tensor(TRL[name]) for name in ("new", "old", "reference"))
LENGTHS = torch.tensor(TRL["lengths"])


@pytest.fixture
def batch() -> Batch:
    width = NEW.shape[1]
    sequences = Sequences(torch.zeros(4, 1 + width, dtype=torch.long), torch.ones_like(LENGTHS), LENGTHS)
    advantages = torch.where(sequences.response_mask, torch.tensor(TRL["advantages"])[:, None], 0.0)
    return Batch(sequences, OLD, torch.zeros_like(OLD), advantages, torch.zeros_like(OLD), torch.arange(4))


def loss_of(kind: Any, config: Any, batch: Batch, beta: float = 0.0) -> float:
    """The loss of an agent that was made of what the loss needs alone."""
    agent = kind.__new__(kind)
    agent.config = config
    agent.penalty = KLPenalty(mock_lm(), beta)
    batch = replace(batch, reference_log_probs=REFERENCE if beta else None)
    agent.base_env = SimpleNamespace(max_new_tokens=TRL["longest"])
    return float(agent.loss(Evaluation(NEW, torch.zeros_like(NEW), torch.zeros_like(NEW)), batch)[0])


@pytest.mark.parametrize("case", TRL["grpo"], ids=lambda case: f"{case['loss_type']}, {case['beta']}, {case['exact']}")
def test_grpo(case: dict[str, Any], batch: Batch) -> None:
    config = GRPOConfig(
        loss_type=case["loss_type"],
        clip_range_high=0.28,
        kl_in="loss",
        kl_gradient="token" if case["exact"] else "k3",
    )
    assert TRL["trl"] == "1.16.0"
    assert loss_of(GRPO, config, batch, case["beta"]) == pytest.approx(case["loss"], abs=tolerance(NEW.numel()))


def test_rloo(batch: Batch) -> None:
    assert loss_of(RLOO, RLOOConfig(), batch) == pytest.approx(TRL["rloo"], abs=tolerance(NEW.numel()))


@pytest.mark.parametrize(
    ("loss_type", "share"), [("grpo", 1.0), ("dapo", 1.0), ("bnpo", 1.0), ("dr_grpo", (3 + 5 + 1 + 4) / (4 * 6))]
)
def test_the_entropy_bonus_of_grpo_is_averaged_as_its_loss(loss_type: str, share: float, batch: Batch) -> None:
    """Entropies of 1 nat; junk in the padding reaches neither the loss nor its gradient."""
    losses = []
    for coef in (0.0, 0.3):
        agent: Any = GRPO.__new__(GRPO)
        agent.config = GRPOConfig(loss_type=loss_type, entropy_coef=coef)
        agent.base_env = SimpleNamespace(max_new_tokens=TRL["longest"])
        mask = batch.response_mask
        new = torch.where(mask, NEW, torch.nan).requires_grad_()
        entropy = torch.where(mask, 1.0, torch.nan)
        losses.append(agent.loss(Evaluation(new, torch.zeros_like(NEW), entropy), batch)[0])
        assert torch.autograd.grad(losses[-1], new)[0].isfinite().all()
    assert (losses[0] - losses[1]).item() == pytest.approx(0.3 * share, abs=tolerance(NEW.numel()))
