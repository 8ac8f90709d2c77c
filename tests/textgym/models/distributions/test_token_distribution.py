"""TokenDistribution: temperature, masks and banned stop tokens."""

from __future__ import annotations

import torch

from textgym.models.distributions.token_distribution import TokenDistribution

ALLOWED = torch.tensor([[True, True, False], [True, True, True]])
BANNED = torch.tensor([False, True])
LOGITS = torch.tensor([[1.0, 0.0, 3.0], [1.0, 2.0, 0.5]])


def test_forbidden_tokens_have_probability_zero_and_the_others_share_it() -> None:
    distribution = TokenDistribution(0.5, ALLOWED, BANNED, (1,))
    expected = torch.stack((LOGITS[0, :2], LOGITS[1, [0, 2]])).div(0.5).softmax(-1)
    probabilities = distribution.log_probs(LOGITS.clone()).exp()
    torch.testing.assert_close(probabilities[0], torch.tensor([*expected[0], 0.0]))
    torch.testing.assert_close(probabilities[1], torch.tensor([expected[1, 0], 0.0, expected[1, 1]]))


def test_a_forbidden_action_is_scored_without_what_forbids_it() -> None:
    forbidden = torch.tensor([2, 1])
    log_probs = TokenDistribution(1.0, ALLOWED, BANNED, (1,)).log_probs_of(LOGITS.clone(), forbidden)
    torch.testing.assert_close(log_probs, LOGITS.log_softmax(-1).gather(1, forbidden[:, None])[:, 0])


def test_logits_that_gradients_flow_through_are_not_overwritten() -> None:
    logits = LOGITS.clone().requires_grad_()
    result = TokenDistribution(0.5, ALLOWED, BANNED, (1,)).logits(logits)
    torch.testing.assert_close(logits, LOGITS)
    result.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[2.0, 2.0, 0.0], [2.0, 0.0, 2.0]]))
