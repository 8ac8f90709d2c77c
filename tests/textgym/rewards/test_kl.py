"""KL estimators, controllers, and the penalty on whole sequences."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import (
    AdaptiveKL,
    FixedKL,
    KLPenalty,
    ThresholdKL,
    compared_with_others,
    estimate_kl,
    kl_to_go,
    sequence_kl,
)
from textgym.testing import ExactTask, assert_close, mock_lm, terms_of

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())

P = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
Q = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1])


def test_estimators_against_the_exact_kl_of_a_categorical() -> None:
    exact = (P * (P / Q).log()).sum()
    k1, k2, k3 = (estimate_kl(P.log(), Q.log(), name) for name in ("k1", "k2", "k3"))
    torch.testing.assert_close((P * k1).sum(), exact)
    torch.testing.assert_close((P * k3).sum(), exact)
    assert (k1 < 0).any()
    assert (k3 >= 0).all()
    torch.testing.assert_close(k2, 0.5 * (P / Q).log().square())
    with pytest.raises(ValueError, match="use 'k1', 'k2' or 'k3'"):
        estimate_kl(P.log(), Q.log(), "full")


def test_gradients_of_the_estimators_as_losses() -> None:
    """Expected gradients of estimates differentiated at fixed samples, by the logits of a softmax policy.

    k1's is zero: as a loss it does nothing. k2's is the gradient of KL(pi, pi_ref), k3's that of KL(pi_ref, pi). As a
    reward, where the score function is differentiated and not the estimate, k1 has the gradient of KL(pi, pi_ref), and
    k3 has not.
    """
    logits = P.log().clone().requires_grad_(True)
    log_p = logits.log_softmax(-1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    forward = gradient((log_p.exp() * (log_p - Q.log())).sum())
    reverse = gradient((Q * (Q.log() - log_p)).sum())
    as_loss = {name: gradient((P * estimate_kl(log_p, Q.log(), name)).sum()) for name in ("k1", "k2", "k3")}
    assert_close(as_loss["k1"], torch.zeros(5), terms=5, scale=1.0)
    assert_close(as_loss["k2"], forward, terms=5, scale=1.0)
    assert_close(as_loss["k3"], reverse, terms=5, scale=1.0)
    as_reward = gradient((P * estimate_kl(P.log(), Q.log(), "k1") * log_p).sum())
    assert_close(as_reward, forward, terms=5, scale=1.0)
    k3_as_reward = gradient((P * estimate_kl(P.log(), Q.log(), "k3") * log_p).sum())
    assert (k3_as_reward - forward).abs().max() > 0.01, "which is why k1 is the default"
    assert (forward - reverse).abs().max() > 0.01


def test_kl_is_summed_over_tokens_and_the_full_form_is_exact() -> None:
    policy, reference = ActorCritic.from_pretrained(mock_lm(seed=0)), mock_lm(seed=1)
    ids = torch.randint(258, (3, 12), generator=torch.Generator().manual_seed(0))
    sequences = Sequences(ids, torch.tensor([3, 4, 2]), torch.tensor([9, 5, 1]), StopRule((256,), 0))
    log_probs = policy.evaluate(sequences).log_prob.detach()
    full = KLPenalty(reference, 0.1, "full").of_sequences(policy, sequences, log_probs)
    p, q = (lm(ids).logits.log_softmax(-1) for lm in (policy.lm, reference))
    by_hand = (p.exp() * (p - q)).sum(-1)  # (N, W), the KL at each position
    for row, (start, count) in enumerate(((3, 9), (4, 5), (2, 1))):
        expected = by_hand[row, start - 1 : start - 1 + count]
        assert_close(full[row, :count], expected, terms=FORWARD)
        assert (full[row, count:] == 0).all()
    k1 = KLPenalty(reference, 0.1).of_sequences(policy, sequences, log_probs)
    drawn = (p - q)[0, 2:11].gather(1, ids[0, 3:12, None]).sum()
    assert_close(k1.sum(1)[0], drawn, terms=FORWARD)


def test_adaptive_controller() -> None:
    """Twice the target for n episodes: the coefficient grows by 1 + 0.2 n / horizon, the error being clipped at 0.2."""
    controller = AdaptiveKL(target=6.0, horizon=1000, coef=0.1)
    controller.update(12.0, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller.update(0.0, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98)
    controller.update(6.6, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98 * 1.01)
    controller.update(0.0, 1_000_000)  # however many episodes: a penalty never turns into a reward
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98 * 1.01 * 0.8)
    fixed = FixedKL(0.3)
    fixed.update(100.0, 100)
    assert fixed.coef == 0.3


@pytest.mark.parametrize(
    "noise", [pytest.param(0.5, marks=pytest.mark.slow), 1.5, pytest.param(3.0, marks=pytest.mark.slow)]
)
def test_the_sequence_kl_is_unbiased_and_varies_less_than_k1_in_the_reward(noise: float) -> None:
    """Over all texts of a task: its mean gradient is that of KL(pi, pi_ref), which the KL of tokens alone misses."""
    task = ExactTask(vocab_size=4, horizon=3)
    policy, reference = ActorCritic(task.language_model()), TokenModel(task.language_model())
    with torch.no_grad():
        for weight in policy.lm.parameters():
            weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    sequences = task.sequences(task.texts)
    new, reference_log_probs = policy.evaluate(sequences, reference=reference), reference.sequence_log_probs(sequences)
    assert new.kl is not None
    log_probs = new.log_prob.sum(1)  # (K,)
    probabilities = log_probs.detach().exp()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(loss, list(policy.lm.parameters()), retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    def mean_and_deviation(losses: torch.Tensor) -> tuple[torch.Tensor, float]:
        each = torch.stack([gradient(loss) for loss in losses])  # (K, weights)
        mean = probabilities @ each
        return mean, float((probabilities @ (each - mean).square().sum(1)).sqrt())

    exact = gradient((log_probs.exp() * (log_probs - reference_log_probs.sum(1))).sum())
    k1 = (new.log_prob - reference_log_probs).detach()
    k1_mean, k1_deviation = mean_and_deviation((new.log_prob * (k1 + kl_to_go(k1))).sum(1))
    ratio, to_go = new.log_prob - new.log_prob.detach(), kl_to_go(new.kl.detach())
    plain_mean, _ = mean_and_deviation(sequence_kl(new.kl, ratio, to_go).sum(1))
    # What `compared_with_others` subtracts, for infinitely many others.
    mask = sequences.response_mask
    others = (probabilities[:, None] * to_go).sum(0) / (probabilities[:, None] * mask).sum(0)
    mean, deviation = mean_and_deviation(sequence_kl(new.kl, ratio, to_go - others * mask).sum(1))
    tokens_mean, _ = mean_and_deviation(new.kl.sum(1))
    k3_mean, _ = mean_and_deviation((ratio.exp() * estimate_kl(new.log_prob, reference_log_probs, "k3")).sum(1))

    size = float(exact.norm())
    for unbiased in (mean, plain_mean):
        assert_close(unbiased, exact, terms=len(task.texts), scale=10 * size)
    assert_close(k1_mean, exact, terms=len(task.texts), scale=10 * size)
    assert deviation < 0.5 * k1_deviation
    for biased in (tokens_mean, k3_mean):
        assert float((biased - exact).norm()) > 0.1 * size
    assert_close(tokens_mean, k3_mean, terms=len(task.texts), scale=10 * size)


def test_a_comparison_with_other_texts_has_no_bias() -> None:
    """Over all pairs of texts: the mean gradient with the baseline is that without it."""
    task = ExactTask(vocab_size=4, horizon=2)
    policy, reference = ActorCritic(task.language_model()), TokenModel(mock_lm(4, seed=5))
    sequences = task.sequences(task.texts)
    new, mask = policy.evaluate(sequences, reference=reference), sequences.response_mask
    assert new.kl is not None
    probabilities, to_go = new.log_prob.detach().sum(1).exp(), kl_to_go(new.kl.detach())
    pairs = [(i, j) for i in range(len(task.texts)) for j in range(len(task.texts))]
    centred = torch.stack([compared_with_others(to_go[[i, j]], mask[[i, j]])[0] for i, j in pairs])  # of the first
    weights = torch.tensor([float(probabilities[i] * probabilities[j]) for i, j in pairs])
    first = new.log_prob[[i for i, _ in pairs]]
    gradients = [
        torch.autograd.grad(loss, policy.lm.parameters(), retain_graph=True)[0]
        for loss in ((weights[:, None] * first * centred).sum(), (probabilities[:, None] * new.log_prob * to_go).sum())
    ]
    assert gradients[1].abs().max() > 0.01
    assert_close(gradients[0], gradients[1], terms=len(pairs), scale=1.0)
    assert compared_with_others(torch.tensor([[3.0]]), torch.tensor([[True]])).tolist() == [[3.0]]


def test_kl_to_go_is_that_of_later_states() -> None:
    kl = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 0.0]])
    assert kl_to_go(kl).tolist() == [[6.0, 4.0, 0.0], [2.0, 0.0, 0.0]]


def followed(controller: AdaptiveKL, run: int, num_updates: int, strength: float) -> list[float]:
    """The KL of a policy that learns more and more from its rewards, and is pulled back by the coefficient."""
    kl, measured = 0.0, []
    rng = np.random.default_rng(0)
    for update in range(num_updates):
        done = update / num_updates
        measured.append(kl * (1 + 0.05 * rng.normal()))
        controller.update(measured[-1], run // num_updates)
        for _ in range(4):  # the learning rate falls to 0
            kl += (1 - done) * (0.35 + 4.2 * done - strength * controller.coef * kl) * 8 / num_updates
    return measured


@pytest.mark.parametrize("run", [1024, 4096, 200_000])
@pytest.mark.parametrize("num_updates", [16, 32, 128])
@pytest.mark.parametrize("strength", [5.0, 11.0])
@pytest.mark.parametrize("target", [2.0, 6.0])
def test_a_controller_in_proportion_to_the_run_reaches_its_target(
    run: int, num_updates: int, strength: float, target: float
) -> None:
    """Whatever its length, and however strongly the coefficient acts."""
    controller = AdaptiveKL(target)
    controller.run = run
    later = followed(controller, run, num_updates, strength)[num_updates // 2 :]
    assert np.mean(later) == pytest.approx(target, rel=0.2)


def test_a_controller_in_proportion_to_the_run_by_hand() -> None:
    """A sixteenth of the run is 100 episodes, and a quarter is 400."""
    controller = AdaptiveKL(target=2.0, coef=0.1)
    controller.run = 1600
    controller.update(3.0, 50)
    coef = 0.1 * math.exp(0.5 * 0.5)
    assert controller.coef == pytest.approx(coef)
    controller.update(2.8, 50)
    slope = (1 - math.exp(-0.5)) * -0.2 / 50
    coef *= math.exp(((2.8 + slope * 400) / 2 - 1) * 0.5)
    assert controller.coef == pytest.approx(coef)
    controller.update(2.4, 1000)  # that many episodes count as 100
    slope += (1 - math.exp(-10)) * (-0.4 / 1000 - slope)
    coef *= math.exp((2.4 + slope * 400) / 2 - 1)
    assert controller.coef == pytest.approx(coef)
    controller.update(100.0, 100)  # the error is at most 1
    assert controller.coef == pytest.approx(coef * math.exp(1))


@pytest.mark.parametrize(
    "controller",
    [AdaptiveKL(target=6.0, horizon=100), ThresholdKL(1.0, 2.0), FixedKL(0.1)],
    ids=lambda c: type(c).__name__,
)
def test_penalties_do_not_share_a_controller(controller: Any) -> None:
    """Three trials with one setting: each starts where the setting says."""
    before = copy.deepcopy(controller)
    for _ in range(3):
        penalty = KLPenalty(mock_lm(), controller)
        assert penalty.coef == 0.1
        penalty.controller.update(100.0, 100)
    assert controller == before


def test_threshold_controller() -> None:
    """PPO-penalty: raised above the upper bound, lowered below the lower one, kept in between."""
    controller = ThresholdKL(low=2.0, high=6.0, factor=1.5, coef=0.1)
    for kl, coef in ((4.0, 0.1), (6.1, 0.15), (2.0, 0.15), (1.9, 0.1), (100.0, 0.15)):
        controller.update(kl, num_episodes=7)
        assert controller.coef == pytest.approx(coef)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_clamp_bounds_what_every_token_pays_and_not_what_is_measured(estimator: str) -> None:
    policy, reference = ActorCritic.from_pretrained(mock_lm(seed=0)), mock_lm(seed=1)
    ids = torch.randint(258, (3, 12), generator=torch.Generator().manual_seed(0))
    sequences = Sequences(ids, torch.tensor([3, 4, 2]), torch.tensor([9, 5, 1]))
    log_probs = policy.sequence_log_probs(sequences)
    penalty = KLPenalty(reference, 0.1, estimator, clamp=0.3)
    kl = penalty.of_sequences(policy, sequences, log_probs)
    assert kl.abs().max() > 0.5
    torch.testing.assert_close(penalty.cost(kl), 0.1 * kl.clamp(-0.3, 0.3))
    torch.testing.assert_close(penalty.charge(log_probs, kl), log_probs - 0.1 * kl.clamp(-0.3, 0.3))
    torch.testing.assert_close(KLPenalty(reference, 0.1, estimator).cost(kl), 0.1 * kl)


def test_full_kl_never_holds_all_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of two tokens the largest tensor is (2, V), whatever N and T."""
    monkeypatch.setattr("textgym.models.distributions.log_probs.CHUNK_ELEMENTS", 2 * 258)
    policy, reference = ActorCritic.from_pretrained(mock_lm(seed=0)), mock_lm(seed=1)
    ids = torch.randint(258, (3, 12), generator=torch.Generator().manual_seed(0))
    sequences = Sequences(ids, torch.tensor([3, 4, 2]), torch.tensor([9, 5, 1]))
    rows: list[int] = []
    policy.head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    KLPenalty(reference, 0.1, "full").of_sequences(policy, sequences, torch.zeros(3, 9))
    assert sum(rows) == 15
    assert max(rows) == 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="kl_clamp must be above 0"):
        KLPenalty(mock_lm(), 0.1, clamp=0.0)
    with pytest.raises(ValueError, match="0 < low < high"):
        ThresholdKL(low=3.0, high=2.0)
    with pytest.raises(ValueError, match="factor must be above 1"):
        ThresholdKL(low=1.0, high=2.0, factor=0.5)
    with pytest.raises(ValueError, match="unknown kl_estimator"):
        KLPenalty(mock_lm(), 0.1, "k4")
    with pytest.raises(ValueError, match="must not be negative"):
        KLPenalty(mock_lm(), -0.1)
    with pytest.raises(ValueError, match="must be above 0"):
        AdaptiveKL(target=0.0)


def test_the_kl_of_padding_is_zero_whatever_is_in_it() -> None:
    penalty = KLPenalty(mock_lm(), 0.1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    junk = torch.tensor([[-1.0, -2.0, torch.nan], [-3.0, torch.inf, 7.0]])
    kl = penalty.of_log_probs(junk, torch.zeros(2, 3), mask)
    assert kl.tolist() == [[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]]


@pytest.mark.parametrize("horizon", [0, 0.0, -1, float("nan"), float("inf")])
def test_a_horizon_without_episodes_is_refused(horizon: float) -> None:
    """Dividing by it would end the run, or turn the penalty into a reward."""
    with pytest.raises(ValueError, match="horizon must be"):
        AdaptiveKL(target=6.0, horizon=horizon)
