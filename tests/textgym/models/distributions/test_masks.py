"""Masks: one by one from observations and whole sequences at once give the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from textgym.models.architectures.attention import ragged
from textgym.models.distributions.masks import ActionMask, FunctionMask, TopKMask, TopPMask, narrow
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.testing import mock_lm, tolerance


def sequences() -> Sequences:
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    return Sequences(ids, torch.tensor([2, 1, 4]), torch.tensor([5, 8, 3]))


def by_length(observation: Any) -> Any:
    """Allows the tokens below the sum of the context, as a list of lists."""
    sums = (observation["input_ids"] * observation["attention_mask"]).sum(1, keepdim=True)
    return (torch.arange(258) < sums % 258).tolist()


@pytest.mark.parametrize("mask", [TopPMask(mock_lm(), p=0.7), TopKMask(mock_lm(), k=9), FunctionMask(by_length)])
def test_sequences_at_once_equal_observations_one_by_one(mask: ActionMask) -> None:
    whole = sequences()
    rows, steps = ragged(whole.response_lengths)
    expected = []
    for row, step in zip(rows.tolist(), steps.tolist(), strict=True):
        length = int(whole.prompt_lengths[row]) + step
        attention = (torch.arange(9) < length).long()
        expected.append(mask({"input_ids": whole.input_ids[row][None], "attention_mask": attention[None]}))
    torch.testing.assert_close(mask.of_sequences(whole), torch.cat(expected))


def test_top_p_holds_the_share_and_no_token_more_than_needed() -> None:
    mask = TopPMask(mock_lm(), p=0.6)
    logits = torch.randn(50, 258, generator=torch.Generator().manual_seed(0)) * 3
    probabilities, chosen = logits.softmax(-1), mask.choose(logits)
    held = (probabilities * chosen).sum(1)
    least = torch.where(chosen, probabilities, 1.0).min(1).values
    assert (held >= 0.6 - tolerance(terms=258)).all()
    assert (held - least < 0.6).all()
    assert (torch.where(chosen, 0.0, probabilities).max(1).values <= least).all()
    assert TopPMask(mock_lm(), p=1.0).choose(logits).all()


def test_top_k_holds_k() -> None:
    logits = torch.randn(50, 258, generator=torch.Generator().manual_seed(0))
    assert (TopKMask(mock_lm(), k=7).choose(logits).sum(1) == 7).all()


def test_refresh_changes_the_opinion() -> None:
    mask = TopKMask(mock_lm(), k=5)
    before, other = mask.of_sequences(sequences()), TokenModel(mock_lm(seed=1))
    mask.refresh(other)
    assert mask.model is other
    assert (mask.of_sequences(sequences()) != before).any()


def test_copies_are_the_mask_itself() -> None:
    """Gymnasium copies the arguments of environments, and a refresh must reach all who hold the mask."""
    mask = TopKMask(mock_lm(), k=5)
    assert copy.deepcopy({"action_mask": mask})["action_mask"] is mask


def test_narrow_never_leaves_nothing() -> None:
    allowed = torch.tensor([[True, True, False], [True, True, False]])
    mask = torch.tensor([[False, True, True], [False, False, True]])
    assert narrow(allowed, mask).tolist() == [[False, True, False], [True, True, False]]


def test_bad_arguments() -> None:
    for p in (0.0, 1.1):
        with pytest.raises(ValueError, match="p is a share of probability"):
            TopPMask(mock_lm(), p=p)
    for k in (0, 259):
        with pytest.raises(ValueError, match="k must be from 1 to the 258 tokens"):
            TopKMask(mock_lm(), k=k)
