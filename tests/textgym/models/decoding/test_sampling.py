"""Sampling from a running sum: the frequencies, and tokens of probability zero however the sum was added up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding import sampling
from textgym.models.decoding.sampling import exact_sum, sample
from textgym.models.distributions.log_probs import StopRule
from textgym.testing import mock_lm

V = 260
real_cumsum = Tensor.cumsum


def distribution(seed: int) -> Tensor:
    """Probabilities `(V,)` of very different sizes, half of them zero."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(V, generator=generator)
    banned = torch.rand(V, generator=generator) < 0.5
    return logits.masked_fill(banned, torch.finfo(logits.dtype).min).softmax(-1)


def uneven(probabilities: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A running sum that goes up and down by more than rounding does, at tokens of probability zero too."""
    cumulative = real_cumsum(probabilities, *args, **kwargs)
    dips = torch.linspace(0, 40, cumulative.shape[-1]).sin() * 1e-3
    return cumulative + dips.to(cumulative.dtype)


@pytest.mark.parametrize("looks", [True, False])
def test_tokens_come_as_often_as_they_are_likely(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pearson's test; the right sampler fails it once in 10,000 seeds, and this one is fixed."""
    monkeypatch.setattr(sampling, "looks_are_free", lambda device: looks)
    probabilities, count = distribution(0), 200_000
    noise = torch.rand(count, 1, generator=torch.Generator().manual_seed(1))
    drawn = sample(probabilities.expand(count, -1), noise)
    seen = torch.bincount(drawn, minlength=V).double()
    expected = probabilities.double() * count
    likely = expected > 5
    statistic = ((seen - expected) ** 2 / expected)[likely].sum()
    assert torch.special.gammaincc((likely.sum() - 1) / 2, statistic / 2) > 1e-4
    assert not seen[probabilities == 0].any()


@pytest.mark.parametrize("looks", [True, False])
def test_no_token_of_probability_zero_is_sampled_from_an_uneven_sum(
    looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "looks_are_free", lambda device: looks)
    monkeypatch.setattr(Tensor, "cumsum", uneven)
    monkeypatch.setattr(torch, "cumsum", uneven)
    probabilities = torch.stack([distribution(seed) for seed in range(8)])
    for height in torch.linspace(0, 1 - 2**-24, 2_000):
        token = sample(probabilities, height.expand(8, 1))
        assert (probabilities.gather(1, token[:, None]) > 0).all()


def test_acting_and_generating_give_finite_log_probs_under_a_mask_and_an_uneven_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tensor, "cumsum", uneven)
    policy = ActorCritic.from_pretrained(mock_lm())
    policy.seed(0)
    prompts, lengths = torch.randint(20, 200, (8, 40)), torch.full((8,), 4)
    allowed = torch.arange(policy.vocab_size) % 7 == 0
    observation = {"input_ids": prompts, "attention_mask": (torch.arange(40) < 4).long().expand(8, -1)}
    for _ in range(50):
        step = policy.act(observation, action_masks=allowed.expand(8, -1))
        assert allowed[step.action].all()
        assert (step.log_prob > -1e3).all()
    stop = StopRule(tuple(range(0, policy.vocab_size, 2)), min_new_tokens=36)
    responses = policy.generate(prompts, lengths, 36, stop)
    assert (responses.tokens % 2 == 1).all()
    assert (responses.log_probs > -1e3).all()


def test_the_sum_of_integers_is_that_of_floats_and_flat_at_probability_zero() -> None:
    probabilities = torch.stack([distribution(seed) for seed in range(8)])
    cumulative = exact_sum(probabilities)
    torch.testing.assert_close(cumulative, probabilities.double().cumsum(-1), atol=V * 2**-52, rtol=0)
    grows = cumulative.diff(dim=-1, prepend=torch.zeros(8, 1)) > 0
    assert torch.equal(grows, probabilities > 0)
    assert torch.equal(cumulative[:, -1], exact_sum(probabilities.flip(-1))[:, -1]), "in another order"
