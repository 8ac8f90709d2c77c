"""RewardEnsemble: how members are put together, and what is logged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.models import RewardEnsemble, RewardModel
from textgym.testing import byte_tokenizer, mock_lm


def member(seed: int) -> RewardModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(mock_lm(num_labels=1).config)
    return RewardModel(model, byte_tokenizer())


@pytest.fixture(scope="module")
def members() -> list[RewardModel]:
    return [member(seed) for seed in range(3)]


def test_reductions(members: list[RewardModel]) -> None:
    texts = (["a ", "b "], ["film", "play"])
    scores = np.array([model(*texts) for model in members])
    assert RewardEnsemble(members)(*texts) == pytest.approx(scores.mean(0).tolist())
    assert RewardEnsemble(members, "min")(*texts) == pytest.approx(scores.min(0).tolist())
    careful = RewardEnsemble(members, "mean_minus_std", k=0.5)(*texts)
    assert careful == pytest.approx((scores.mean(0) - 0.5 * scores.std(0)).tolist())


def test_members_read_ids_and_disagreement_is_logged(members: list[RewardModel], finished: Any) -> None:
    scorer = Scorer(RewardEnsemble(members), tokenizer=byte_tokenizer())
    assert all(model.shared_ids for model in members)
    scores = scorer(finished)
    each = np.array(
        [
            model(
                finished.prompts,
                finished.completions,
                prompt_ids=finished.prompt_ids,
                completion_ids=finished.completion_ids,
            )
            for model in members
        ]
    )
    assert scores.score.tolist() == pytest.approx(each.mean(0).tolist())
    assert scores.metrics["reward_ensemble/std"] == pytest.approx(each.std(0).mean())
    assert list(scores.components) == ["reward_ensemble"]


def test_members_by_name_follow_the_environments_device_and_others_stay(
    members: list[RewardModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    free, fixed = RewardEnsemble([members[0], "tiny"]), RewardEnsemble([members[0], "tiny"], device="cpu")
    moved: list[RewardModel] = []
    monkeypatch.setattr(RewardModel, "to", lambda model, device: moved.append(model))
    for ensemble in (free, fixed):
        ensemble.follow_device(torch.device("cpu"))
    assert moved == [free.members[1]]


def test_members_by_name_and_bad_arguments() -> None:
    assert RewardEnsemble(["tiny"])(["A "], ["joy."]) == RewardModel.from_pretrained("tiny")(["A "], ["joy."])
    with pytest.raises(ValueError, match="needs members"):
        RewardEnsemble([])
    with pytest.raises(ValueError, match="unknown reduce 'max'"):
        RewardEnsemble(["tiny"], "max")  # type: ignore[arg-type]
