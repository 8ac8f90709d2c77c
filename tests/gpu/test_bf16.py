"""What bfloat16 moves on a device stays within the bands of ActorCritic.from_pretrained and RolloutAgentConfig.bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences

pytestmark = pytest.mark.gpu

ROWS, PROMPT, NEW = 24, 8, 16


@pytest.fixture(autouse=True)
def _bf16(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")


def played(policy: ActorCritic) -> tuple[Sequences, Tensor]:
    """Responses of the policy, and the log-probs that it noted."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(policy.vocab_size - 2, (ROWS, PROMPT + NEW), generator=generator).to(policy.device)
    lengths = torch.full((ROWS,), PROMPT, device=policy.device)
    policy.seed(0)
    for _ in range(3):  # the third time by captured steps
        responses = policy.generate(prompts, lengths, NEW, StopRule())
    ids = torch.cat([prompts[:, :PROMPT], responses.tokens], 1)
    return Sequences(ids, lengths, torch.full_like(lengths, NEW)), responses.log_probs


def assert_in_band(log_probs: Tensor, others: Tensor) -> None:
    """In nats: below 0.03 a token on average, 99% of them below 0.15, all below 0.5; ratios average 1."""
    assert log_probs.dtype == others.dtype == torch.float32
    moved = (log_probs - others).detach().flatten()
    assert float(moved.abs().mean()) < 0.03
    assert float(moved.abs().quantile(0.99)) < 0.15
    assert float(moved.abs().max()) < 0.5
    assert float(moved.exp().mean()) == pytest.approx(1.0, abs=0.01)


def test_autocast_moves_log_probs_within_the_band(device: torch.device) -> None:
    policy = ActorCritic.from_pretrained("tiny", device=device)
    sequences, noted = played(policy)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = policy.evaluate(sequences).log_prob
    assert_in_band(rounded, noted)
    assert float((rounded - noted).abs().mean()) > 1e-3, "bfloat16 moves something"


def test_weights_in_bf16_decode_and_score_within_the_band(device: torch.device) -> None:
    policy = ActorCritic.from_pretrained("tiny", device=device)
    half = ActorCritic.from_pretrained(copy.deepcopy(policy.lm).bfloat16())
    sequences, noted = played(half)
    again = half.evaluate(sequences).log_prob
    exact = policy.evaluate(sequences).log_prob
    assert_in_band(again, noted)  # how far these two are apart is the device's: some round alike
    assert_in_band(again, exact)
    assert float((again - exact).abs().mean()) > 1e-3, "bfloat16 moves something"
