"""What off-policy agents remember, and how it is drawn."""

from __future__ import annotations

import pytest
import torch

from textgym.agents import DQNConfig
from textgym.agents.common.replay_buffer import ReplayBuffer, priorities_of
from textgym.models.sequences import Sequences
from textgym.testing import ExactTask

TASK = ExactTask(vocab_size=5, horizon=3, seed=2)


def texts(*chosen: int) -> Sequences:
    return TASK.sequences([TASK.texts[index] for index in chosen])


def remember(memory: ReplayBuffer, *chosen: int) -> None:
    sequences = texts(*chosen)
    rewards = torch.tensor([[float(index)] for index in chosen]) * sequences.response_mask
    memory.add(sequences, rewards, -rewards, longest=TASK.horizon)


def test_memory_keeps_the_newest_episodes() -> None:
    memory = ReplayBuffer(capacity=3)
    remember(memory, 1, 2)
    remember(memory, 3, 4)
    assert len(memory) == 3
    batch = memory.sample(200, torch.Generator().manual_seed(0))
    seen = batch.rewards.amax(1).int().tolist()
    assert set(seen) == {2, 3, 4}
    expected = texts(*seen)
    actual, mask = batch.sequences, batch.sequences.response_mask
    assert torch.equal(actual.response_lengths, expected.response_lengths)
    assert torch.equal(actual.actions, expected.actions)
    assert torch.equal(batch.reference_log_probs, -batch.rewards)
    assert (batch.rewards[~mask] == 0).all()
    assert (batch.weights == 1).all()


def test_memory_draws_by_priority_and_makes_up_for_it() -> None:
    memory = ReplayBuffer(capacity=8, alpha=0.5, beta=1.0)
    remember(memory, 1, 2)
    mask = texts(1, 2).response_mask
    errors = torch.zeros(mask.shape)
    errors[:, 0] = torch.tensor([1.0, -4.0])
    memory.reprioritise(torch.tensor([0, 1]), priorities_of(errors, mask))
    priorities = memory.tensors["priorities"][:2]
    lengths = texts(1, 2).response_lengths
    torch.testing.assert_close(priorities, torch.tensor([1.0, 4.0]) * (0.9 + 0.1 / lengths), atol=1e-5, rtol=0)
    batch = memory.sample(20_000, torch.Generator().manual_seed(0))
    odds = priorities.sqrt() / priorities.sqrt().sum()
    share = (batch.indices == 1).float().mean()
    assert share == pytest.approx(float(odds[1]), abs=0.02)
    # With beta = 1 a weighted mean is that of uniform draws.
    mean = (batch.weights * batch.rewards.amax(1)).sum() / batch.weights.sum()
    assert mean == pytest.approx(1.5, abs=0.03)


def test_weights_by_hand_and_their_exponent() -> None:
    """(N P)^-beta over the largest: P = 1/4 and 3/4 of two episodes are 1/2 and 3/2 times the mean."""
    memory = ReplayBuffer(capacity=8, alpha=1.0)
    assert memory.beta == DQNConfig().priority_correction == 0.4, "of Schaul et al. (2016), table 3"
    remember(memory, 1, 2)
    memory.reprioritise(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    for beta in (0.0, 0.4, 1.0):
        memory.beta = beta
        batch = memory.sample(200, torch.Generator().manual_seed(0))
        assert len(batch.indices.unique()) == 2
        torch.testing.assert_close(batch.weights, torch.where(batch.indices == 0, 1.0, 3.0**-beta))


def test_new_episodes_are_urgent() -> None:
    memory = ReplayBuffer(capacity=8, alpha=1.0)
    remember(memory, 1)
    mask = texts(1).response_mask
    memory.reprioritise(torch.tensor([0]), priorities_of(7 * torch.ones(mask.shape), mask))
    remember(memory, 2)
    assert memory.tensors["priorities"][1] == memory.tensors["priorities"][0]


def test_without_priorities_episodes_are_sampled_uniformly_whatever_their_errors() -> None:
    """That is the default of the buffer and of DQN."""
    assert not DQNConfig().prioritised
    assert DQNConfig().priority_exponent == 0.6, "the exponent of Schaul et al. (2016), with prioritised=True"
    buffer = ReplayBuffer(4)
    assert buffer.alpha == 0.0
    lengths = torch.tensor([2, 2, 2, 2])
    sequences = Sequences(torch.zeros(4, 3, dtype=torch.long), torch.ones_like(lengths), lengths)
    buffer.add(sequences, torch.zeros(4, 2), torch.zeros(4, 2), 2)
    errors = torch.tensor([[1e3, 1e3], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    buffer.reprioritise(torch.arange(4), priorities_of(errors, torch.ones(4, 2).bool()))
    batch = buffer.sample(4000, torch.Generator().manual_seed(0))
    assert torch.equal(batch.weights, torch.ones(4000))
    counts = torch.bincount(batch.indices, minlength=4)
    assert (counts - 1000).abs().max() < 140  # five standard deviations, 27 each
