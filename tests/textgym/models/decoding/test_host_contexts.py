"""What the host knows of contexts and sequences, so that it need not ask the device, is what the device would say."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym  # noqa: F401
from textgym.models.decoding.cached_decoder import CachedDecoder, NumberedContexts, PlainContexts
from textgym.models.decoding.contexts import Shown
from textgym.models.sequences import HostRows, Sequences
from textgym.testing import assert_close, mock_lm, terms_of

FORWARD = terms_of(mock_lm())
ROWS, WIDTH = 3, 10


def shown(envs: Any, seed: int = 0) -> Any:
    observation, _ = envs.reset(seed=seed)
    return observation


@pytest.fixture
def envs() -> Any:
    return gym.make_vec(
        "textgym/Sentiment-v0", num_envs=ROWS, max_new_tokens=4, array="torch", kl_mode="deferred", min_new_tokens=2
    )


@pytest.mark.numerics
@pytest.mark.parametrize("kind", [NumberedContexts, PlainContexts])
def test_a_decoder_that_is_told_how_contexts_changed_gives_what_one_that_compares_them_gives(kind: Any) -> None:
    told, compares = (CachedDecoder(mock_lm(), ROWS, WIDTH) for _ in range(2))
    rng = np.random.default_rng(0)
    ids, lengths, episodes = rng.integers(0, 90, (ROWS, WIDTH)), np.array([2, 3, 4]), np.arange(ROWS)
    for step in range(30):
        host = kind(ids.copy(), lengths.copy()) if kind is PlainContexts else kind(episodes.copy(), lengths.copy())
        tensors = torch.from_numpy(ids.copy()), torch.from_numpy(lengths.copy())
        assert_close(told.advance(*tensors, host), compares.advance(*tensors), terms=FORWARD)

        for row in range(ROWS):
            if lengths[row] == WIDTH or rng.random() < 0.2:  # another episode, which may be one token longer
                ids[row], lengths[row], episodes[row] = rng.integers(0, 90, WIDTH), rng.integers(1, WIDTH), 100 + step
            elif rng.random() < 0.7:
                lengths[row] += 1  # what stood in the padding is the new token


def test_an_observation_knows_its_contexts_until_somebody_changes_it(envs: Any) -> None:
    observation = shown(envs)
    assert isinstance(observation, Shown)
    assert observation.contexts.lengths.tolist() == observation["attention_mask"].sum(1).tolist()

    observation["input_ids"][0, 0] += 1
    assert observation.contexts is None
    observation = shown(envs)
    observation["input_ids"] = observation["input_ids"].clone()
    assert observation.contexts is None
    with torch.inference_mode():
        assert shown(envs).contexts is None


def test_copies_of_an_observation_are_plain(envs: Any) -> None:
    observation = shown(envs)
    for other in (copy.copy(observation), copy.deepcopy(observation), pickle.loads(pickle.dumps(observation))):
        assert type(other) is dict
        assert torch.equal(other["input_ids"], observation["input_ids"])


def test_no_two_episodes_have_one_number(envs: Any) -> None:
    envs.unwrapped.set_autoreset_mode("SameStep")
    seen = [shown(envs).contexts.episodes.copy()]
    for _ in range(12):
        observation, _, terminated, _, _ = envs.step(torch.tensor([5, 6, 7]))
        same = observation.contexts.episodes == seen[-1]
        assert same.tolist() == (~terminated).tolist()
        seen.append(observation.contexts.episodes.copy())


def test_the_host_knows_of_episodes_what_it_would_read(envs: Any) -> None:
    shown(envs)
    for actions in ([5, 6, 7], [8, 9, 0], [0, 3, 4], [1, 2, 0]):
        envs.step(torch.tensor(actions))
    sequences = envs.unwrapped.task.episodes.sequences()
    assert sequences.known is not None
    for known, read in zip(sequences.known, HostRows.read(sequences), strict=True):
        assert known.tolist() == read.tolist()


def test_what_the_host_knows_follows_the_rows() -> None:
    ids = torch.arange(12).view(3, 4)
    written = torch.tensor([[True, True], [True, False], [True, True]])
    sequences = Sequences(ids, torch.tensor([1, 2, 2]), torch.tensor([1, 2, 2]), generated=written)
    assert sequences.host.num_tokens.tolist() == [1, 1, 2]
    for rows in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([1])):
        part = sequences[rows]
        assert part.known is not None
        for known, read in zip(part.known, HostRows.read(part), strict=True):
            assert known.tolist() == read.tolist()
    joined = Sequences.cat([sequences[:1], sequences[1:]])
    assert joined.host.num_tokens.tolist() == [1, 1, 2]
    assert torch.equal(joined.response_mask, sequences.response_mask)
