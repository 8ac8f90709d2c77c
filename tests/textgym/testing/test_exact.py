"""Exact optima: the enumeration, the closed form, and the table language model that stands for any distribution."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.token_model import TokenModel
from textgym.testing import ExactOptimum, ExactTask, TableConfig, TableLM, assert_close, mock_lm, terms_of

FORWARD = terms_of(mock_lm())


def test_every_text_is_listed_once() -> None:
    task = ExactTask(vocab_size=4, horizon=3)  # ids 0 and 1 are letters, 2 is EOS, 3 is padding
    by_hand = set()
    for ids in itertools.product(range(4), repeat=3):
        by_hand.add(ids[: ids.index(2) + 1] if 2 in ids else ids)
    assert set(task.texts) == by_hand
    assert len(task.texts) == len(by_hand)


@pytest.mark.parametrize("model", ["table", "transformer"])
def test_log_probs_are_a_distribution_and_those_of_stepping(model: Any) -> None:
    task = ExactTask(vocab_size=6, horizon=3, model=model)
    assert np.exp(task.log_reference).sum() == pytest.approx(1.0, abs=1e-5)
    lm = task.language_model()
    for index in (0, 7, len(task.texts) - 1):
        text = task.texts[index]
        logits = lm(torch.tensor([[0, *text]])).logits[0].log_softmax(-1)
        expected = sum(float(logits[step, token]) for step, token in enumerate(text))
        assert task.log_reference[index] == pytest.approx(expected, abs=1e-4)


def test_the_closed_form_is_the_maximum() -> None:
    task = ExactTask(vocab_size=5, horizon=2)
    for beta in (0.2, 1.0):
        optimum = task.optimum(beta)
        assert optimum.probabilities.sum() == pytest.approx(1.0)
        assert optimum.objective(optimum.log_probs) == pytest.approx(optimum.value)
        assert optimum.gap_closed(task.log_reference) == pytest.approx(0.0)
        assert optimum.gap_closed(optimum.log_probs) == pytest.approx(1.0)
        assert optimum.kl_from(optimum.log_probs) == pytest.approx(0.0, abs=1e-9)
        rng = np.random.default_rng(0)
        for _ in range(20):
            logits = optimum.log_probs + rng.normal(size=len(task.texts))
            other = logits - np.log(np.exp(logits).sum())
            assert optimum.objective(other) < optimum.value
            # What a policy falls short of is beta KL(pi, pi*).
            assert optimum.value - optimum.objective(other) == pytest.approx(beta * optimum.kl_from(other))


def test_shapes_of_rewards() -> None:
    sparse = ExactTask(vocab_size=8, horizon=3, reward="sparse")
    assert sorted(sparse.rewards)[-2:] == [0.0, 1.0]
    assert np.exp(sparse.log_reference[sparse.rewards.argmax()]) == pytest.approx(0.003, rel=0.3)
    deceptive = ExactTask(vocab_size=8, horizon=3, reward="deceptive")
    best, lure = deceptive.rewards.argmax(), deceptive.log_reference.argmax()
    assert deceptive.rewards[best] == 1.0
    assert deceptive.rewards[lure] == 0.5
    assert deceptive.texts[best][0] != deceptive.texts[lure][0]
    with pytest.raises(ValueError, match="unknown reward"):
        ExactTask(reward="odd")  # type: ignore[arg-type]


def test_score_is_the_table_of_rewards() -> None:
    task = ExactTask(vocab_size=5, horizon=2)
    assert task.score([list(text) for text in task.texts]) == task.rewards.tolist()


# --- the table ---


@pytest.fixture
def table() -> TableLM:
    lm = TableLM(TableConfig(vocab_size=4, max_tokens=4))
    with torch.no_grad():
        lm.model.logits.weight.normal_(generator=torch.Generator().manual_seed(0))
    return lm


def test_every_text_has_logits_of_its_own(table: TableLM) -> None:
    rows = set()
    for length in (1, 2, 3, 4):
        for ids in itertools.product(range(4), repeat=length):
            rows.add(tuple(table(torch.tensor([ids])).logits[0, -1].tolist()))
    assert len(rows) == 4 + 16 + 64 + 256


def test_cached_decoding_of_the_table(table: TableLM) -> None:
    rng = torch.Generator().manual_seed(1)
    decoder = CachedDecoder(table, 3, 4)
    ids, lengths = torch.zeros(3, 4, dtype=torch.long), torch.ones(3, dtype=torch.long)
    for _ in range(30):
        hidden = decoder.advance(ids, lengths)
        for row in range(3):
            expected = table(ids[row : row + 1, : lengths[row]]).logits[0, -1]
            torch.testing.assert_close(hidden[row], expected)
        restart = (torch.rand(3, generator=rng) < 0.3) | (lengths == 4)
        ids.scatter_(1, lengths.clamp(max=3)[:, None], torch.randint(4, (3, 1), generator=rng))
        lengths = torch.where(restart, 1, lengths + 1)
        ids[restart] = torch.randint(4, (3, 4), generator=rng)[restart]


def test_packed_scoring_of_the_table() -> None:
    task = ExactTask(vocab_size=5, horizon=3)
    policy = TokenModel(task.language_model())
    packed = policy.sequence_log_probs(task.sequences(task.texts)).sum(1).numpy()
    assert_close(packed, task.log_reference, terms=FORWARD)


def test_the_table_is_saved_and_loaded(table: TableLM, tmp_path: Path) -> None:
    ActorCritic(table).save_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert_close(loaded(torch.tensor([[1, 2, 3]])).logits, table(torch.tensor([[1, 2, 3]])).logits, terms=FORWARD)
    with pytest.raises(ValueError, match="too many rows"):
        TableLM(TableConfig(vocab_size=28, max_tokens=9))


def test_optimum_of_a_coin() -> None:
    optimum = ExactOptimum(np.log([0.75, 0.25]), np.array([0.0, 1.0]), beta=0.5)
    z = 0.75 + 0.25 * np.exp(2)
    assert optimum.value == pytest.approx(0.5 * np.log(z))
    assert optimum.probabilities == pytest.approx([0.75 / z, 0.25 * np.exp(2) / z])
