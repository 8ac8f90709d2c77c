"""In which precision models decode and are checked, whatever the caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from textgym import ActorCritic
from textgym.models.architectures.support import full_precision
from textgym.models.distributions.log_probs import StopRule
from textgym.testing import assert_close, mock_lm, terms_of

OBSERVATION = {"input_ids": torch.tensor([[3, 4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
CPU = torch.device("cpu")


@pytest.fixture
def matmul() -> Iterator[Any]:
    """Settings of matrix products on CUDA, which need no GPU, and are put back."""
    backend: Any = torch.backends.cuda.matmul
    yield backend
    for product in (backend, torch.backends.mkldnn.matmul):
        product.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.numerics
def test_decoding_under_autocast_is_decoding_without() -> None:
    """With bfloat16 numbers would be off by a hundredth."""
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    torch.nn.init.ones_(policy.value_head.weight)
    ids, lengths = torch.tensor([[3, 4, 5, *[0] * 8]]), torch.tensor([3])
    found = []
    for enabled in (False, True):
        policy.reset_cache()
        policy.seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            step = policy.act(OBSERVATION)
            written = policy.generate(ids, lengths, 8, StopRule((), 0))
            scored = policy.log_prob(OBSERVATION, step.action)
            found.append([*step, policy.value(OBSERVATION), policy.next_logits(OBSERVATION), scored, *written])
    for one, other in zip(*found, strict=True):
        if one.is_floating_point():
            assert_close(one, other, terms=terms_of(policy.lm))
        else:
            assert torch.equal(one, other)


def test_a_cache_that_was_begun_under_autocast_goes_on_without() -> None:
    policy = ActorCritic.from_pretrained(mock_lm())
    with torch.autocast("cpu", torch.bfloat16):
        policy.act(OBSERVATION)
    longer = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert policy.act(longer).log_prob.dtype == torch.float32


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_a_check_in_full_precision_puts_the_callers_setting_back(matmul: Any, setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    before = matmul.allow_tf32
    with full_precision(CPU):
        assert not matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == setting
    assert matmul.allow_tf32 == before


def test_a_check_in_full_precision_knows_the_newer_setting(matmul: Any) -> None:
    matmul.fp32_precision = "tf32"
    with full_precision(CPU):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


def test_a_model_can_be_loaded_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ActorCritic.from_pretrained(mock_lm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_policy_that_has_acted_and_written_can_change_its_dtype(dtype: torch.dtype) -> None:
    policy = ActorCritic.from_pretrained(mock_lm())
    ids, lengths = torch.tensor([[3, 4, 5, *[0] * 8]]), torch.tensor([3])
    policy.act(OBSERVATION)
    policy.generate(ids, lengths, 8, StopRule((), 0))
    policy.to(dtype)
    assert policy.cache_bytes == 0
    policy.seed(0)
    fresh = ActorCritic.from_pretrained(mock_lm()).to(dtype)
    fresh.seed(0)
    assert policy.act(OBSERVATION).action == fresh.act(OBSERVATION).action
    assert torch.equal(
        policy.generate(ids, lengths, 8, StopRule((), 0)).tokens,
        fresh.generate(ids, lengths, 8, StopRule((), 0)).tokens,
    )
