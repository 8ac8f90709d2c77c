"""Token log-probs: the chunked backward pass is the gradient of the plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from textgym.models.distributions import log_probs
from textgym.models.distributions.log_probs import token_log_probs
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.testing import assert_close, mock_lm, terms_of

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())

M, D, V = 23, 8, 50
STOPS = (3, 4)


def inputs(bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor, dict[str, Tensor]]:
    """Hidden states, a head, actions, and masks under which every action may be chosen."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(D, V, bias=bias)
    for weight in head.parameters():
        nn.init.normal_(weight, std=0.5, generator=generator)
    actions = torch.randint(V, (M,), generator=generator)
    actions[5] = STOPS[0]  # banned below, and chosen all the same
    allowed = torch.rand(M, V, generator=generator) < 0.7
    allowed[torch.arange(M), actions] = True
    banned = torch.arange(M) < 10
    hidden = torch.randn(M, D, generator=generator, requires_grad=True)
    return hidden, head, actions, {"banned": banned, "allowed": allowed}


def plainly(
    hidden: Tensor, head: nn.Linear, actions: Tensor, temperature: float, banned: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By autograd over an (M, V) tensor."""
    legal = torch.ones(M, V, dtype=torch.bool) if allowed is None else allowed.clone()
    if banned is not None:
        for row in banned.nonzero()[:, 0]:
            if actions[row] not in STOPS:
                legal[row, list(STOPS)] = False
    log_p = (head(hidden) / temperature).masked_fill(~legal, -torch.inf).log_softmax(-1)
    entropy = -torch.where(legal, log_p.exp() * log_p.masked_fill(~legal, 0.0), 0.0).sum(-1)
    return log_p[torch.arange(M), actions], entropy


@pytest.mark.parametrize("chunk", [V, 4 * V, 100 * V])
@pytest.mark.parametrize("masks", [(), ("banned",), ("allowed",), ("banned", "allowed")], ids="+".join)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_chunked_log_probs_and_gradients_are_those_of_the_plain_computation(
    chunk: int, masks: tuple[str, ...], bias: bool, entropy_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", chunk)
    hidden, head, actions, given = inputs(bias)
    used: dict[str, Any] = {name: given.get(name) if name in masks else None for name in given}
    leaves = [hidden, *head.parameters()]
    outputs, gradients = [], []
    for score in (
        lambda: plainly(hidden, head, actions, 0.7, **used),
        lambda: token_log_probs(
            hidden, head, actions, V, TokenDistribution(0.7, stop_ids=STOPS, **used), entropy_gradient=entropy_gradient
        ),
    ):
        chosen, entropy = score()
        loss = (torch.linspace(-1, 1, M) * chosen).sum()
        if entropy_gradient:
            loss = loss + (torch.linspace(1, -0.5, M) * entropy).sum()
        outputs.append(torch.stack((chosen, entropy)).detach())
        gradients.append(torch.autograd.grad(loss, leaves))
    assert_close(outputs[1], outputs[0], terms=FORWARD)
    assert_close(gradients[1], gradients[0], terms=FORWARD, scale=1.0)


def test_a_head_of_another_kind_is_differentiated_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 4 * V)
    hidden, head, actions, _ = inputs()
    results = []
    for kind in (head, lambda x: head(x)):
        chosen, entropy = token_log_probs(hidden, kind, actions, V, TokenDistribution(0.7))
        results.append((chosen, entropy, torch.autograd.grad(chosen.sum(), head.weight)[0]))
    assert_close(results[1], results[0], terms=FORWARD)


def test_entropy_is_only_a_figure_unless_its_gradient_is_asked_for() -> None:
    hidden, head, actions, _ = inputs()
    assert not token_log_probs(hidden, head, actions, V)[1].requires_grad
    assert token_log_probs(hidden, head, actions, V, entropy_gradient=True)[1].requires_grad


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, actions, _ = inputs()
    head.requires_grad_(False)
    token_log_probs(hidden, head, actions, V)[0].sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("chunk", [4 * V, 100 * V])
def test_log_probs_under_autocast_are_float32_and_close(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", chunk)
    hidden, head, actions, _ = inputs()
    plain, _ = token_log_probs(hidden, head, actions, V)
    (exact,) = torch.autograd.grad(plain.sum(), head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, entropy = token_log_probs(hidden, head, actions, V)
    (gradient,) = torch.autograd.grad(rounded.sum(), head.weight)
    assert rounded.dtype == entropy.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, atol=0.1, rtol=0)
    assert (gradient - exact).norm() < 0.02 * exact.norm()
