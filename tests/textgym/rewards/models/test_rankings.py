"""Reward models from rankings and ratings: the losses by hand, the rows that are read, and what is learned."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from textgym.data.corpora.sources import Snippet
from textgym.data.preferences import load_preferences
from textgym.errors import ConfigError, DataError, DataWarning, UnchangedWeightsError
from textgym.rewards.models import RewardModelConfig, pairwise_loss, train_reward_model
from textgym.rewards.models.accuracy import Accuracy
from textgym.rewards.models.ranking_loss import (
    LOSSES,
    RankedTexts,
    RankingObjective,
    plackett_luce_loss,
    ranked_pairs_loss,
)
from textgym.rewards.models.rankings import make_rankings, placed_rankings
from textgym.rewards.models.training import read_and_split
from textgym.testing import Measured, assert_learns

SCORES = torch.tensor([[1.0, -0.5, 2.0]])
VALUES = torch.tensor([[2.0, 1.0, 3.0]])  # the order is third, first, second
REAL = torch.ones(1, 3, dtype=torch.bool)
FAST: dict[str, Any] = {"epochs": 4, "batch_size": 4, "matrix_learning_rate": 0.02, "learning_rate": 0.01}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- losses ---


def test_ranked_pairs_are_equation_1_of_instructgpt_by_hand() -> None:
    expected = -(math.log(sigmoid(2 - 1)) + math.log(sigmoid(2 + 0.5)) + math.log(sigmoid(1 + 0.5))) / 3
    torch.testing.assert_close(ranked_pairs_loss(SCORES, VALUES, REAL), torch.tensor([expected]))


def test_plackett_luce_is_the_likelihood_of_choosing_one_after_another_by_hand() -> None:
    weights = [math.exp(score) for score in (2.0, 1.0, -0.5)]  # best first
    probability = weights[0] / sum(weights) * weights[1] / sum(weights[1:])
    torch.testing.assert_close(plackett_luce_loss(SCORES, VALUES, REAL), torch.tensor([-math.log(probability)]))


def test_the_probabilities_of_all_orders_add_up_to_one() -> None:
    orders = torch.tensor(list(itertools.permutations([1.0, 2.0, 3.0, 4.0])))  # (24, 4)
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0]).expand(24, 4)
    losses = plackett_luce_loss(scores, orders, torch.ones(24, 4, dtype=torch.bool))
    torch.testing.assert_close((-losses).exp().sum(), torch.tensor(1.0))


def test_two_texts_are_a_pair_of_bradley_and_terry() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0])
    scores, values = torch.stack([rejected, chosen], 1), torch.tensor([[0.0, 1.0]] * 2)
    real = torch.ones(2, 2, dtype=torch.bool)
    for loss in (ranked_pairs_loss, plackett_luce_loss):
        torch.testing.assert_close(loss(scores, values, real).mean(), pairwise_loss(chosen, rejected))


def test_ties_are_not_compared() -> None:
    values = torch.tensor([[1.0, 1.0, 3.0]])
    both = -(math.log(sigmoid(2 - 1)) + math.log(sigmoid(2 + 0.5)))
    torch.testing.assert_close(ranked_pairs_loss(SCORES, values, REAL), torch.tensor([both / 3]))
    first = math.exp(2.0) / (math.exp(2.0) + math.exp(1.0) + math.exp(-0.5))
    torch.testing.assert_close(plackett_luce_loss(SCORES, values, REAL), torch.tensor([-math.log(first)]))
    for kind in ("ranked_pairs", "plackett_luce"):
        assert LOSSES[kind](SCORES, torch.ones(1, 3), REAL).item() == 0.0


def ranked(*values: float) -> RankedTexts:
    return RankedTexts(tuple((97 + index, 256) for index in range(len(values))), values, cluster=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_longer_ranking_in_the_batch_changes_nothing(kind: Any) -> None:
    objective = RankingObjective(kind)
    scores = torch.tensor([0.5, -1.0, 2.0, 1.5], requires_grad=True)

    def sum_of(*rankings: RankedTexts) -> Tensor:
        batch = objective.collate(rankings)
        return objective.loss(scores, batch) * objective.weight(batch)

    short, long = ranked(1.0, 0.0), ranked(0.0, 3.0, 2.0, 1.0)
    together = sum_of(short, long)
    torch.testing.assert_close(together, sum_of(short) + sum_of(long))
    together.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_the_mean_is_over_rankings_and_of_ratings_over_texts() -> None:
    batch = [ranked(1.0, 0.0), ranked(0.0, 3.0, 2.0)]
    weights = {kind: int(RankingObjective(kind).weight(RankingObjective(kind).collate(batch))) for kind in LOSSES}  # type: ignore[arg-type]
    assert weights == {"ranked_pairs": 2, "plackett_luce": 2, "regression": 5}
    objective = RankingObjective("regression")
    scores = torch.tensor([2.0, 0.0, 2.0])
    assert objective.loss(scores, objective.collate(batch)).item() == pytest.approx((1 + 0 + 4 + 9 + 0) / 5)


# --- rows ---

CHAT = [{"role": "user", "content": "Is it good?"}]
ULTRAFEEDBACK = {
    "instruction": "Is it good?",
    "models": ["a", "b"],
    "completions": [
        {"response": "Yes.", "overall_score": 7.5, "annotations": {"helpfulness": {"Rating": "4"}}},
        {"response": "No.", "overall_score": 9.0, "annotations": None},
    ],
}


@pytest.mark.parametrize(
    ("row", "prompt", "pairs"),
    [
        ({"prompt": "p", "completions": [" a", " b", " c"], "ranks": [2, 1, 3]}, "p", ["b>a", "a>c", "b>c"]),
        ({"prompt": "p", "completions": [" a", " b", " c"], "ratings": [2, 1, 2]}, "p", ["a>b", "c>b"]),
        ({"prompt": "p", "answers": [{"answer": " a", "rank": 2}, {"answer": " b", "rank": 1}]}, "p", ["b>a"]),
        (ULTRAFEEDBACK, CHAT, ["No.>Yes."]),
    ],
    ids=["ranks", "ratings", "nectar", "ultrafeedback"],
)
def test_a_row_is_a_ranking_and_all_of_its_pairs(row: dict[str, Any], prompt: Any, pairs: list[str]) -> None:
    [placed] = placed_rankings([row], rated=False)
    assert placed.ranking.prompt == prompt
    found = load_preferences([row])
    assert all(pair["prompt"] == prompt for pair in found)

    def said(text: Any) -> str:
        return (text if isinstance(text, str) else text[0]["content"]).strip()

    assert sorted(f"{said(pair['chosen'])}>{said(pair['rejected'])}" for pair in found) == sorted(pairs)
    rated = "ratings" in row or row is ULTRAFEEDBACK
    assert placed.ranking.rated == rated
    assert all(("margin" in pair) == rated for pair in found)


def test_a_margin_is_the_difference_of_ratings() -> None:
    assert load_preferences([ULTRAFEEDBACK])[0]["margin"] == 1.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a", "b"], "ranks": [1]}, "'completions' of row 0 .* has 2 texts, and 'ranks' has 1 numbers"),
        ({"completions": ["a", "b"]}, "row 0 .*: it needs either 'ranks' or 'ratings'"),
        ({"completions": ["a", "b"], "ranks": [1, 2], "ratings": [2, 1]}, "needs either 'ranks' or 'ratings'"),
        ({"completions": ["a", "b"], "ratings": [1, math.nan]}, "a rating of row 0 .* is nan: it must be a finite"),
        ({"completions": ["a", "b"], "ranks": ["1", 2]}, "a rank of row 0 .* is '1': it must be a number"),
        ({"completions": "ab", "ranks": [1, 2]}, "must be lists, got 'ab'"),
        ({"instruction": "p", "completions": [{"response": "a"}]}, "with 'response', 'overall_score'"),
        ({"prompt": "p", "completion": "a"}, "it needs 'chosen' and 'rejected', or 'completions' with"),
    ],
)
def test_a_row_that_cannot_be_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        placed_rankings([row], rated=False)


def test_a_row_without_answers_is_no_ranking() -> None:
    rows = [{"prompt": "p", "answers": []}, {"prompt": "p", "completions": [" a", " b"], "ranks": [1, 2]}]
    assert [row.place for row in placed_rankings(rows, rated=False)] == ["row 1 of the rankings"]


def test_regression_needs_ratings() -> None:
    rows = [{"prompt": "p", "completion": " a", "rating": 3.0}, {"prompt": "p", "chosen": " a", "rejected": " b"}]
    with pytest.raises(DataError, match="learns ratings, and row 1 of the rankings has none"):
        placed_rankings(rows, rated=True)
    assert [row.ranking.values for row in placed_rankings(rows, rated=False)] == [[3.0], [1.0, 0.0]]


def test_rankings_of_one_prompt_stay_together() -> None:
    rows = [{"prompt": f"p{i // 2}", "completions": [f" a{i}", f" b{i}"], "ranks": [1, 2]} for i in range(20)]
    train, held = read_and_split(rows, None, RewardModelConfig(loss="plackett_luce", heldout_fraction=0.3))
    assert len(train) == 14
    assert len(held) == 6
    assert not {row.ranking.prompt for row in train} & {pair["prompt"] for pair in held}


def test_held_out_ratings_are_compared_whatever_their_prompts_are() -> None:
    rows = [{"prompt": f"p{i} ", "completion": f"a{i}", "rating": float(i)} for i in range(10)]
    train, held = read_and_split(rows, None, RewardModelConfig(loss="regression", heldout_fraction=0.3))
    assert len(train) == 7
    assert len(held) == 3
    for pair in held:
        better, worse = (int(pair[side].split("a")[1]) for side in ("chosen", "rejected"))
        assert pair["chosen"] == f"p{better} a{better}"
        assert pair["margin"] == better - worse > 0


def test_each_snippet_is_in_one_ranking() -> None:
    snippets = [Snippet(str(i), float(i)) for i in range(10)]
    rows = make_rankings(snippets, group_size=4)
    assert [len(row["ratings"]) for row in rows] == [4, 4, 2]
    assert sorted(text for row in rows for text in row["completions"]) == [str(i) for i in range(10)]
    assert all(float(text) == rating for row in rows for text, rating in zip(*row.values(), strict=True))


# --- training ---

RANKINGS = [
    {"prompt": f"{i} ", "completions": ["bad film", "good film", "so so film"], "ratings": [10.0, 30.0, 20.0]}
    for i in range(16)
]


def trained(rows: list[dict[str, Any]], folder: Path, seed: int, **settings: Any) -> tuple[list[float], Accuracy]:
    """Scores of a bad, a good and a mediocre text, and the accuracy on held-out rows."""
    config = RewardModelConfig(**{**FAST, "seed": seed, **settings})
    model, accuracy = train_reward_model(rows, folder, config=config)
    return model.score_texts(["99 bad film", "99 good film", "99 so so film"]).tolist(), accuracy


@pytest.mark.parametrize("loss", [pytest.param("ranked_pairs", marks=pytest.mark.slow), "plackett_luce"])
def test_it_learns_the_order(loss: Any, mock_folder: Path) -> None:
    """The smaller of the two gaps, measured over 4 seeds of each loss; a false failure has a chance of 5e-5.

    The accuracy would be lower if a gap were negative, 7 standard deviations away.
    """
    gaps = []
    for seed in range(2):
        (bad, good, so_so), accuracy = trained(RANKINGS, mock_folder, seed, loss=loss)
        gaps.append(min(good - so_so, so_so - bad))
        assert accuracy == 1.0
        assert accuracy.num_pairs == 6
    assert_learns(gaps, at_least=1.0, measured=Measured(mean=5.69, standard_deviation=0.75, runs=8))


def test_without_a_learning_rate_no_order_is_learned(mock_folder: Path) -> None:
    with pytest.raises(UnchangedWeightsError):
        trained(RANKINGS, mock_folder, 0, loss="plackett_luce", learning_rate=0.0, matrix_learning_rate=0.0, epochs=1)


def test_regression_learns_the_ratings_in_their_unit(mock_folder: Path) -> None:
    """A model that scores all texts with the mean rating gains 0; a false failure has a chance of 7e-5."""
    rows = [
        {"prompt": row["prompt"], "completion": text, "rating": rating}
        for row in RANKINGS
        for text, rating in zip(row["completions"], row["ratings"], strict=True)
    ]
    gains = []
    for seed in range(2):
        scores, accuracy = trained(rows, mock_folder, seed, loss="regression", batch_size=12)
        errors = [abs(score - rating) for score, rating in zip(scores, (10.0, 30.0, 20.0), strict=True)]
        gains.append(1 - sum(errors) / 20)
        assert accuracy == 1.0
    assert_learns(gains, at_least=0.3, measured=Measured(mean=0.833, standard_deviation=0.09, runs=8))


def test_rankings_of_which_nothing_can_be_learned_are_said_and_left_out(mock_folder: Path) -> None:
    tied = {"prompt": "tied ", "completions": ["bad film", "good film"], "ratings": [1.0, 1.0]}
    config = RewardModelConfig(loss="plackett_luce", epochs=0.1, batch_size=4)
    with pytest.warns(DataWarning, match="1 of 5 rankings have no two texts with different values"):
        train_reward_model([*RANKINGS[:4], tied], mock_folder, config=config, heldout=[])
    with pytest.raises(DataError, match="none of the rankings has two texts with different values"):
        train_reward_model([tied], mock_folder, config=config, heldout=[])
    same = {"prompt": "same ", "completions": ["film", "film"], "ranks": [1, 2]}
    with pytest.raises(DataError, match="have two sides that are equal to the model"):
        train_reward_model([*RANKINGS[:4], same], mock_folder, config=config, heldout=[])
    with pytest.raises(DataError, match="all 2 ratings are 1, so there is nothing to learn"):
        train_reward_model([tied], mock_folder, config=RewardModelConfig(loss="regression"), heldout=[])


def test_settings_of_pairs_are_refused_for_rankings() -> None:
    with pytest.raises(ConfigError, match="use_margin=True cannot be used with loss='plackett_luce'"):
        RewardModelConfig(loss="plackett_luce", use_margin=True)
