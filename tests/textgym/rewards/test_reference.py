"""SyncReference: how far it moves, what it leaves alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from textgym.models.actor_critic import ActorCritic
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import KLPenalty
from textgym.rewards.reference import SyncReference
from textgym.testing import assert_close, mock_lm, terms_of, tolerance

pytestmark = pytest.mark.numerics

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs
FORWARD = terms_of(mock_lm())

SEQUENCES = Sequences(torch.arange(24).view(2, 12) + 60, torch.tensor([3, 5]), torch.tensor([9, 4]))


def kl_of(penalty: KLPenalty, policy: ActorCritic) -> float:
    log_probs = policy.sequence_log_probs(SEQUENCES)
    return float(penalty.of_sequences(policy, SEQUENCES, log_probs).abs().sum())


def test_a_full_step_makes_the_reference_the_policy() -> None:
    policy, penalty = ActorCritic.from_pretrained(mock_lm(seed=0)), KLPenalty(mock_lm(seed=1), 0.1)
    assert kl_of(penalty, policy) > 1
    SyncReference(every=1).sync(penalty, policy)
    assert kl_of(penalty, policy) < ROUNDING
    assert not any(parameter.requires_grad for parameter in penalty.reference.parameters())


def test_alpha_is_a_moving_average() -> None:
    policy, penalty = ActorCritic.from_pretrained(mock_lm(seed=0)), KLPenalty(mock_lm(seed=1), 0.1)
    sync = SyncReference(every=1, alpha=0.25)
    for _ in range(2):
        sync.sync(penalty, policy)
    expected = {
        name: (1 - 0.75**2) * policy.lm.state_dict()[name] + 0.75**2 * weight
        for name, weight in mock_lm(seed=1).state_dict().items()
    }
    for name, weight in penalty.reference.lm.state_dict().items():
        torch.testing.assert_close(weight, expected[name])


def test_tied_weights_move_once() -> None:
    policy, penalty = ActorCritic.from_pretrained("tiny"), KLPenalty("tiny", 0.1)
    start = penalty.reference.head.weight.clone()
    assert penalty.reference.lm.get_input_embeddings().weight is penalty.reference.head.weight
    with torch.no_grad():
        policy.head.weight.add_(1.0)
    SyncReference(every=1, alpha=0.1).sync(penalty, policy)
    torch.testing.assert_close(penalty.reference.head.weight, start + 0.1)


def test_models_that_others_share_stay() -> None:
    first, second = KLPenalty("tiny", 0.1), KLPenalty("tiny", 0.1)
    assert first.reference.lm is second.reference.lm
    before = copy.deepcopy(second.reference.lm.state_dict())
    policy = ActorCritic.from_pretrained("tiny")
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter.add_(0.01)
    SyncReference(every=1).sync(first, policy)
    assert first.reference.lm is not second.reference.lm
    assert all(torch.equal(weight, before[name]) for name, weight in second.reference.lm.state_dict().items())


def test_cached_decoding_does_not_see_the_old_weights() -> None:
    policy, penalty = ActorCritic.from_pretrained(mock_lm(seed=0)), KLPenalty(mock_lm(seed=1), 0.1)
    observation = {"input_ids": SEQUENCES.input_ids, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    penalty.reference.log_prob(observation, torch.tensor([1, 2]))
    SyncReference(every=1).sync(penalty, policy)
    expected = TokenModel(copy.deepcopy(policy.lm)).log_prob(observation, torch.tensor([1, 2]))
    assert_close(penalty.reference.log_prob(observation, torch.tensor([1, 2])), expected, terms=FORWARD)


def test_under_lora_the_merged_weights_are_taken() -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), lora=LoraConfig(target_modules=["q_proj", "v_proj"]))
    penalty = KLPenalty(policy.reference(), 0.1)
    with torch.no_grad():
        for name, parameter in policy.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert kl_of(penalty, policy) > 0.1
    before = policy.sequence_log_probs(SEQUENCES)
    SyncReference(every=1).sync(penalty, policy)
    assert kl_of(penalty, policy) < ROUNDING
    assert_close(policy.sequence_log_probs(SEQUENCES), before, terms=FORWARD)


def test_it_moves_after_every_so_many_updates() -> None:
    policy, penalty = ActorCritic.from_pretrained(mock_lm(seed=0)), KLPenalty(mock_lm(seed=1), 0.1)
    sync = SyncReference(every=3)
    moved = []
    for updates in range(1, 7):
        penalty = KLPenalty(mock_lm(seed=1), 0.1)
        sync(SimpleNamespace(updates=updates, penalty=penalty, policy=policy, reference_may_move=True), {})
        moved.append(penalty.owns_reference)
    assert moved == [False, False, True, False, False, True]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        SyncReference(every=0)
    with pytest.raises(ValueError, match="alpha is a share"):
        SyncReference(every=1, alpha=0.0)
    with pytest.raises(ValueError, match="other weights than the policy"):
        SyncReference(every=1).sync(KLPenalty(mock_lm(num_layers=1), 0.1), ActorCritic.from_pretrained(mock_lm()))
