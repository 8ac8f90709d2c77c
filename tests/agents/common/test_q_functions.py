"""Q-functions on a language model: where they start, noise, quantiles, bans."""

from __future__ import annotations

import pytest
import torch

from textgym.agents.common.q_functions import GreedyQ, Heads, SoftQ
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.testing import ExactTask, assert_close, mock_lm, terms_of

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())

TASK = ExactTask(vocab_size=5, horizon=3, seed=2)


def texts(*chosen: int) -> Sequences:
    return TASK.sequences([TASK.texts[index] for index in chosen])


def actor(noise: float = 1.0) -> ActorCritic:
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        policy.lm.model.logits.weight += noise * torch.randn(policy.lm.model.logits.weight.shape, generator=generator)
        policy.value_head.weight.normal_(generator=generator)
    return policy


def test_soft_values_are_the_log_sum_of_soft_qs() -> None:
    """V(s) = beta log sum_a pi_ref(a | s) exp(Q(s, a) / beta), and pi = pi_ref exp((Q - V) / beta)."""
    beta, reference = 0.3, actor(noise=0.0)
    policy = actor()
    ids = torch.tensor([[0, token] for token in range(TASK.vocab_size)])
    ones = torch.ones(TASK.vocab_size, dtype=torch.long)
    sequences = Sequences(ids, ones, ones)
    log_reference = reference.sequence_log_probs(sequences)
    value, added = SoftQ(policy).of_actions(sequences, log_reference, beta)
    q = (value + added)[:, 0]
    assert_close(beta * (log_reference[:, 0] + q / beta).logsumexp(0), value[0, 0], terms=FORWARD)


@pytest.mark.parametrize("dueling", [True, False])
def test_greedy_q_starts_from_the_language_model(dueling: bool) -> None:
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    q, sequences = GreedyQ(policy, Heads(policy, noisy=False, n_quantiles=1), 0.5, dueling), texts(0, 40, 80)
    logits = policy.logits(sequences.states())
    expected = 0.5 * (logits.log_softmax(-1) if dueling else logits)
    best = q.best(sequences)
    assert torch.equal(best.action, logits.argmax(-1))
    assert_close(best.value, expected.amax(-1), terms=FORWARD)
    assert_close(q.of_actions(sequences), expected.gather(1, sequences.actions[:, None])[:, 0], terms=FORWARD)
    assert_close(q.of_actions(sequences, best.action), best.value, terms=FORWARD)


def test_quantiles_have_q_as_their_mean() -> None:
    policy, sequences = actor(), texts(0, 40, 80)
    heads = Heads(policy, noisy=False, n_quantiles=5)
    with torch.no_grad():
        heads.psi.normal_(generator=torch.Generator().manual_seed(0))
        heads.offsets.bias.normal_(generator=torch.Generator().manual_seed(1))
    quantiles = GreedyQ(policy, heads).of_actions(sequences)
    plain = GreedyQ(policy, Heads(policy, noisy=False, n_quantiles=1)).of_actions(sequences)
    assert quantiles.shape == (len(plain), 5)
    assert quantiles.std(1).min() > 0.1
    assert_close(quantiles.mean(1), plain, terms=FORWARD)


def test_noise_is_factored_and_can_be_taken_away() -> None:
    policy, sequences = actor(), texts(0, 40, 80)
    heads = Heads(policy, noisy=True, n_quantiles=1)
    q = GreedyQ(policy, heads)
    plain = q.of_actions(sequences)
    heads.resample(torch.Generator().manual_seed(0))
    noisy = q.of_actions(sequences)
    assert (noisy - plain).abs().max() > 0.01
    hidden = policy.hidden(sequences.states())
    assert heads.noise is not None
    out, within = heads.noise  # (1, V), (1, d)
    weight = policy.head.weight + heads.sigma * (out.T @ within)
    assert_close(q.logits(hidden), hidden @ weight.T, terms=FORWARD)
    noisy.sum().backward()
    assert heads.sigma.grad is not None
    heads.quieten()
    assert_close(q.of_actions(sequences), plain, terms=FORWARD)


def test_banned_stop_tokens_are_never_best() -> None:
    stop = int(TASK.stop.ids[0])
    policy = actor()
    sequences = texts(0, 40, 80)
    banned = Sequences(
        sequences.input_ids, sequences.prompt_lengths, sequences.response_lengths, StopRule((stop,), min_new_tokens=3)
    )
    with torch.no_grad():
        policy.lm.model.logits.weight[:, stop] += 100.0
    for dueling in (True, False):
        q = GreedyQ(policy, Heads(policy, noisy=False, n_quantiles=1), dueling=dueling)
        assert (q.best(sequences).action == stop).all()
        best = q.best(banned)
        assert (best.action != stop).all()
        assert best.value.abs().max() < 1e3
