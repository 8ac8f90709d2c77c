"""Training of reward models: batches, what is held out, columns, faults of data, and weights that move."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from textgym.data.preferences import placed_preferences
from textgym.errors import DataError, DataWarning
from textgym.rewards.models import RewardModelConfig, train_reward_model
from textgym.rewards.models.training import split_preferences

PAIRS = [{"chosen": f"good {index}", "rejected": f"bad {index}", "group": index // 4} for index in range(16)]


class Updates(TrainerCallback):
    """Counts updates and the weights that they change."""

    count = 0

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.before = [weight.detach().clone() for weight in model.parameters()]

    def on_step_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.count += 1
        pairs = zip(model.parameters(), self.before, strict=True)
        self.moved = sum(not torch.equal(weight, before) for weight, before in pairs)


def numbered(**columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Film {i} is", "chosen": " a joy.", "rejected": " a bore.", **columns} for i in range(20)]


# --- batches ---


@pytest.mark.parametrize("shared", [{"prompt": "p"}, {"group": 0}, {}])
def test_batches_are_counted_in_pairs_whatever_they_share(shared: dict[str, Any], mock_folder: Path) -> None:
    pairs = [{"chosen": f"good {index}", "rejected": f"bad {index}", **shared} for index in range(50)]
    updates = Updates()
    train_reward_model(pairs, mock_folder, config=RewardModelConfig(batch_size=8), heldout=[], callbacks=[updates])
    assert updates.count == 7
    assert updates.moved == len(updates.before)


def test_the_example_of_the_documentation_trains_and_says_how_sure_its_accuracy_is() -> None:
    updates = Updates()
    config = RewardModelConfig(use_probability=True, center_coefficient=0.01)
    pairs = numbered(margin=2.0, probability=0.9)
    _, accuracy = train_reward_model(pairs, base="tiny", config=config, callbacks=[updates])
    assert updates.count > 1
    assert updates.moved == len(updates.before)
    assert accuracy.num_pairs == 2
    assert 0.0 <= accuracy.low < accuracy <= accuracy.high <= 1.0
    assert "2 pairs, 95% interval" in str(accuracy)


# --- what is held out ---


def test_groups_are_held_out_whole() -> None:
    train, held = split_preferences(placed_preferences(PAIRS), 0.5)
    assert (len(train), len(held)) == (8, 8)
    assert not {row.pair["group"] for row in train} & {row.pair["group"] for row in held}


def test_a_large_prompt_does_not_take_the_place_of_many() -> None:
    pairs = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b"} for i in range(90)]
    pairs += [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    for seed in range(5):
        train, held = split_preferences(placed_preferences(pairs), 0.1, seed)
        assert {row.pair["prompt"] for row in train} > {"p"}
        assert len(held) in (9, 10)


def test_pairs_of_one_prompt_are_said_to_leave_nothing_to_measure_on(mock_folder: Path) -> None:
    pairs = [{"prompt": "p", "chosen": f"good {index}", "rejected": f"bad {index}"} for index in range(8)]
    with pytest.warns(DataWarning, match="have one prompt or group in common, so none is held out"):
        _, accuracy = train_reward_model(pairs, mock_folder)
    assert math.isnan(accuracy)
    assert str(accuracy) == "unknown (no pairs were held out)"


@pytest.mark.parametrize("form", ["apart", "within", "punctuation", "conversations"])
def test_no_prompt_is_in_both_parts(form: str) -> None:
    """Twenty prompts with ten pairs each, whose answers begin alike now and then."""
    rng = random.Random(0)
    pairs: list[dict[str, Any]] = []
    for number in range(20):
        for _ in range(10):
            prompt = f"What is the answer to question {number}?"
            if form == "punctuation" and rng.random() < 0.5:
                prompt = prompt.upper().replace("?", " ?!")
            answers = [" ".join(rng.choices(["It", "is", "one", "two", "three"], k=3)) + f" {i}" for i in range(2)]
            if form == "within":
                pairs.append({"chosen": f"{prompt} {answers[0]}", "rejected": f"{prompt} {answers[1]}"})
            elif form == "conversations":
                asked = {"role": "user", "content": prompt}
                sides = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
                pairs.append({"chosen": sides[0], "rejected": sides[1]})
            else:
                pairs.append({"prompt": prompt, "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"})
    rng.shuffle(pairs)
    train, held = split_preferences(placed_preferences(pairs), 0.2)
    asked = [{re.findall(r"question (\d+)", str(row.pair).lower())[0] for row in part} for part in (train, held)]
    assert len(asked[0]) + len(asked[1]) == 20
    assert len(asked[1]) >= 2
    assert not asked[0] & asked[1]


def test_held_out_pairs_that_were_trained_on_are_said(mock_folder: Path) -> None:
    with pytest.warns(DataWarning, match="20 of 20 held-out pairs share their prompt or text with training rows"):
        train_reward_model(numbered(), mock_folder, heldout=numbered())


# --- columns and faults ---


@pytest.mark.parametrize(("setting", "column"), [("use_margin", "margin"), ("use_probability", "probability")])
def test_a_column_that_a_setting_needs_is_in_every_row(setting: str, column: str, mock_folder: Path) -> None:
    pairs = numbered(**{column: 0.5})
    pairs[7][column] = None
    with pytest.raises(DataError, match=rf"{setting} needs a '{column}' .*; 1 of 20 have none, the first is row 7"):
        train_reward_model(pairs, mock_folder, config=RewardModelConfig(**{setting: True}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": " a joy."}, "have two sides that are equal to the model .first: row 3 of the preferences"),
        ({"chosen": " so" * 300}, "lose the beginning of their prompt .first: row 3 of"),
        ({"chosen": " "}, "have an empty completion .first: row 3 of"),
        ({"prompt": " "}, "have an empty prompt .first: row 3 of"),
        ({"rejected": [{"role": "assistant", "content": "no"}]}, "row 3 of the preferences: .* no chat template"),
    ],
)
def test_faults_are_refused_with_the_first_row(change: dict[str, Any], message: str, mock_folder: Path) -> None:
    pairs = numbered()
    pairs[3] |= change
    with pytest.raises(DataError, match=message):
        train_reward_model(pairs, mock_folder, heldout=[])


def test_a_share_of_faults_that_is_allowed_is_said_and_trained_on(mock_folder: Path) -> None:
    pairs = numbered()
    pairs[3]["rejected"] = pairs[3]["chosen"]
    with pytest.warns(DataWarning, match=r"^1 of 20 preferences have two sides that are equal"):
        train_reward_model(pairs, mock_folder, config=RewardModelConfig(allow_faulty_rows=0.1), heldout=[])
