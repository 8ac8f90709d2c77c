"""PPO's losses against values by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from textgym.agents import A2C, PPO, A2CConfig, PPOConfig
from textgym.agents.common.policy_gradient import Batch
from textgym.models.actor_critic import Evaluation
from textgym.testing import tolerance

pytestmark = pytest.mark.numerics

ROUNDING = tolerance(terms=4, scale=3.0)  # of a few numbers up to 3
ONE = torch.ones(1, 1, dtype=torch.bool)


def loss_of(kind: Any, config: Any, mask: Tensor, **columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of columns `(N, T)` that are 0 unless they are given, by an agent that has no policy."""
    empty = torch.zeros(mask.shape)
    new = Evaluation(columns.get("new", empty), columns.get("new_values", empty), empty)
    old = [columns.get(name, empty) for name in ("log_probs", "values", "advantages", "returns")]
    agent = kind.__new__(kind)
    agent.config, agent.penalty_coef = config, 4.0
    found: tuple[Tensor, dict[str, Tensor]] = agent.loss(
        new,
        Batch(SimpleNamespace(response_mask=mask), *old, torch.arange(len(mask))),  # type: ignore[arg-type]
    )
    return found


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor = ONE, **settings: Any) -> Any:
    config = PPOConfig(value_coef=0.0, **settings)
    return loss_of(PPO, config, mask, new=new, log_probs=old, advantages=advantages)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor = ONE, **settings: Any) -> Any:
    return loss_of(PPO, PPOConfig(value_coef=1.0, **settings), mask, new_values=values, values=old, returns=returns)


def one(value: float, gradient: bool = False) -> Tensor:
    return torch.tensor([[value]], requires_grad=gradient)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "flat"),
    [
        (2.0, 1.1, -2.2, False),  # better and within the range: push on
        (2.0, 1.5, -2.4, True),  # better and already far: clipped, no gradient
        (2.0, 0.5, -1.0, False),  # better but made less likely: bring it back
        (-2.0, 0.9, 1.8, False),  # worse and within the range: push on
        (-2.0, 0.5, 1.6, True),  # worse and already far: clipped, no gradient
        (-2.0, 1.5, 3.0, False),  # worse but made more likely: bring it back
    ],
)
def test_clip_signs(advantage: float, ratio: float, expected: float, flat: bool) -> None:
    log_probs = one(math.log(ratio), gradient=True)
    loss, figures = policy_loss(log_probs, one(0.0), one(advantage))
    torch.testing.assert_close(loss.item(), expected, atol=1e-5, rtol=0)
    loss.backward()
    assert (log_probs.grad.item() == 0) == flat
    assert figures["policy/clipfrac_avg"].item() == float(flat)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "flat"),
    [
        (0.1, 0.0, 1.0, 0.405, False),  # within the range
        (0.5, 0.0, 1.0, 0.32, True),  # towards the target but too far: the clipped error counts, no gradient
        (0.5, 0.0, -1.0, 1.125, False),  # away from the target: the plain error counts
        (-0.5, 0.0, 0.1, 0.18, False),  # past the range on the wrong side
    ],
)
def test_clipped_value_loss(value: float, old: float, target: float, expected: float, flat: bool) -> None:
    values = one(value, gradient=True)
    clipped, _ = value_loss(values, one(old), one(target))
    plain, _ = value_loss(values, one(old), one(target), clip_range_value=None)
    torch.testing.assert_close(clipped.item(), expected, atol=tolerance(terms=4), rtol=0)
    assert plain.item() == pytest.approx(0.5 * (value - target) ** 2)
    assert clipped >= plain
    clipped.backward()
    assert (values.grad.item() == 0) == flat


def test_values_within_the_range_are_not_counted_as_clipped() -> None:
    rng = torch.Generator().manual_seed(0)
    values, old = 0.18 * torch.rand(2, 1000, generator=rng) - 0.09
    mask = torch.ones(1, 1000, dtype=torch.bool)
    _, figures = value_loss(values[None], old[None], torch.randn(1, 1000, generator=rng), mask)
    assert figures["val/clipfrac_avg"] == 0


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_junk_in_padding_reaches_neither_loss_nor_gradient(junk: float) -> None:
    mask = torch.tensor([[True, True, False]])
    clean = [torch.tensor([[0.1, -0.2, 0.0]]) + i for i in range(3)]
    dirty = [torch.where(mask, x, junk) for x in clean]
    dirty[0].requires_grad_()
    columns = {"new": dirty[0], "log_probs": dirty[0].detach() - 0.1, "advantages": dirty[2]}
    columns |= {"new_values": dirty[0], "values": dirty[1], "returns": dirty[2]}
    loss, figures = loss_of(PPO, PPOConfig(), mask, **columns)
    loss.backward()
    assert all(torch.isfinite(x) for x in (loss, *figures.values()))
    assert dirty[0].grad.isfinite().all()
    assert dirty[0].grad[0, 2] == 0


def test_metrics_ignore_padding() -> None:
    rng = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(2, 4, generator=rng) for _ in range(3))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])

    def padded(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full((2, 6), fill)], 1)

    wide = torch.cat([mask, torch.zeros(2, 6, dtype=torch.bool)], 1)
    _, plain = policy_loss(new, old, advantages, mask)
    _, more = policy_loss(padded(new, 5.0), padded(old, -5.0), padded(advantages, 9.0), wide)
    for name, expected in plain.items():
        torch.testing.assert_close(more[name], expected)
    assert plain["policy/approxkl_avg"] >= 0


def surrogate(ratio: float, advantage: float, **settings: Any) -> tuple[float, float]:
    """The loss at a ratio, and its gradient by the ratio's logarithm."""
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    old, advantages = torch.zeros(1, 1), torch.tensor([[advantage]])
    loss, _ = policy_loss(log_prob, old, advantages, **settings)
    return loss.item(), torch.autograd.grad(loss, log_prob)[0].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.25, 1.0, -1.25, -1.25),  # below the higher bound of 1.4
        (1.5, 1.0, -1.4, 0.0),
        (0.7, -1.0, 0.8, 0.0),  # the lower bound is the usual one
        (1.5, -1.0, 1.5, 1.5),
    ],
)
def test_asymmetric_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert surrogate(ratio, advantage, clip_range_high=0.4) == pytest.approx(
        (loss, gradient), abs=tolerance(terms=4, scale=3.0)
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (5.0, -2.0, 6.0, 0.0),  # 3 x 2 and no more
        (2.0, -2.0, 4.0, 4.0),
        (5.0, 2.0, -2.4, 0.0),  # where the advantage is positive it changes nothing
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_dual_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert surrogate(ratio, advantage, dual_clip=3.0) == pytest.approx(
        (loss, gradient), abs=tolerance(terms=4, scale=3.0)
    )


def test_penalty_by_hand_and_its_gradient() -> None:
    log_prob = torch.tensor([[math.log(1.5)]], requires_grad=True)
    loss, _ = policy_loss(log_prob, torch.zeros(1, 1), torch.tensor([[2.0]]), variant="penalty")
    assert loss.item() == pytest.approx(-1.5 * 2 + 4 * (1.5 - 1 - math.log(1.5)))
    gradient = torch.autograd.grad(loss, log_prob)[0].item()
    assert gradient == pytest.approx(-1.5 * 2 + 4 * (1.5 - 1))


def test_penalty_is_the_kl_from_the_old_policy_on_average() -> None:
    old, new = (torch.tensor(p).log() for p in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))
    exact = (old.exp() * (old - new)).sum()
    mask = torch.ones(1, 3, dtype=torch.bool)
    ratio = (new - old).exp()
    by_token, _ = policy_loss(new[None], old[None], torch.zeros(1, 3), mask, variant="penalty")
    assert by_token.item() / 4 == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert (old.exp() * (ratio - 1 - ratio.log())).sum().item() == pytest.approx(exact.item())


def test_nan_in_the_padding_of_the_other_losses() -> None:
    mask = torch.tensor([[True, False]])
    log_probs = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    advantages = torch.tensor([[2.0, torch.nan]])
    old = torch.tensor([[-1.0, torch.inf]])
    losses = (
        loss_of(A2C, A2CConfig(value_coef=0.0), mask, new=log_probs, advantages=advantages)[0],
        policy_loss(log_probs, old, advantages, mask, variant="penalty")[0],
    )
    for loss in losses:
        assert loss.item() == pytest.approx(2.0 if loss is losses[0] else -2.0)
        gradient = torch.autograd.grad(loss, log_probs)[0]
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0


def test_kl_in_the_loss_by_hand() -> None:
    """Two tokens of which one is padding: beta times the ratio times k3, and its gradient is that of KL(pi, pi_ref)."""
    mask = torch.tensor([[True, False]])
    new = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    old, reference = torch.tensor([[-1.2, 3.0]]), torch.tensor([[-0.5, torch.nan]])
    agent: Any = PPO.__new__(PPO)
    agent.config = PPOConfig(value_coef=0.0, kl_in="loss")
    agent.penalty = SimpleNamespace(coef=0.3)
    zeros = torch.zeros(1, 2)
    sequences: Any = SimpleNamespace(response_mask=mask)
    batch = Batch(sequences, old, zeros, zeros, zeros, torch.arange(1), reference_log_probs=reference)
    loss, figures = agent.loss(Evaluation(new, zeros, zeros), batch)
    expected = math.exp(0.2) * (math.exp(0.5) - 1 - 0.5)
    assert figures["loss/kl_avg"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.3 * expected)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.tolist() == [[pytest.approx(0.3 * math.exp(0.2) * -0.5), 0.0]]  # the ratio times log pi / pi_ref
