"""Training on preference pairs: the loss, batches of groups, the optimiser, and what training leaves behind."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from textgym.errors import NonFiniteError, UnchangedWeightsError
from textgym.models.machine.shared_batches import SharedBatches, SharedLoader
from textgym.rewards.models import RewardModel, RewardModelConfig, pairwise_accuracy, train_reward_model
from textgym.rewards.models.pairwise import (
    ClusterSampler,
    MuonAndAdamW,
    PairwiseObjective,
    RatedPair,
    RewardTrainer,
    collate,
    pairwise_loss,
)
from textgym.testing import Measured, assert_close, assert_learns, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

EOS = 256

GOOD, BAD = ["good film", "a good play", "very good", "good"], ["bad film", "a bad play", "very bad", "bad"]
PAIRS = [
    {"chosen": good, "rejected": bad, "margin": 1.0, "group": group}
    for group in range(4)
    for good, bad in zip(GOOD, BAD, strict=True)
]
EXACT: dict[str, Any] = {"mean_coefficient": 0.0, "matrix_learning_rate": 0.02, "learning_rate": 0.01, "batch_size": 4}
FAST = RewardModelConfig(epochs=8, **EXACT)


def gaps(model: RewardModel) -> tuple[float, float]:
    """How much higher a model scores what was preferred: the least of the pairs, and a pair that is held out."""
    trained = model.score_texts(GOOD) - model.score_texts(BAD)
    other = model.score_texts(["one good day"]) - model.score_texts(["one bad day"])
    return float(trained.min()), float(other.min())


def test_it_learns_what_was_preferred(mock_folder: Path) -> None:
    """A head that was not trained is random, and its gaps differ by about 1.3 from seed to seed."""
    models = [train_reward_model(PAIRS, mock_folder, config=replace(FAST, seed=seed))[0] for seed in range(3)]
    trained, other = zip(*map(gaps, models), strict=True)
    assert_learns(trained, at_least=4.0, measured=Measured(mean=9.92, standard_deviation=1.2, runs=12))
    assert_learns(other, at_least=2.0, measured=Measured(mean=9.47, standard_deviation=1.9, runs=12))


@pytest.mark.slow
def test_a_reward_model_that_does_not_learn_is_told_apart(mock_folder: Path) -> None:
    still = replace(FAST, learning_rate=0.0, matrix_learning_rate=0.0)
    with pytest.raises(UnchangedWeightsError, match="no weight has changed"):
        train_reward_model(PAIRS, mock_folder, config=still)
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    assert max(gaps(train_reward_model(swapped, mock_folder, config=FAST)[0])) < 0.0


def test_the_accuracy_is_that_of_the_saved_model(mock_folder: Path) -> None:
    heldout = [{"prompt": "one ", "chosen": "good day", "rejected": "bad day"}]
    model, accuracy = train_reward_model(PAIRS, mock_folder, config=replace(FAST, epochs=1), heldout=heldout)
    assert accuracy == pairwise_accuracy(model, heldout)
    before = pairwise_accuracy(model, PAIRS)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    model.save_pretrained(mock_folder / "reward")
    assert pairwise_accuracy(RewardModel.from_pretrained(mock_folder / "reward"), PAIRS) == before


def test_training_is_quiet_and_leaves_no_trace(
    mock_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    files = sorted(tmp_path.rglob("*"))
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    threads = torch.get_num_threads()
    capfd.readouterr()
    train_reward_model(PAIRS, mock_folder, config=RewardModelConfig(epochs=1))
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == files
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert torch.get_num_threads() == threads


def test_the_seed_decides(mock_folder: Path) -> None:
    scores = [
        train_reward_model(PAIRS, mock_folder, config=RewardModelConfig(epochs=1, seed=seed))[0].score_texts(GOOD)
        for seed in (1, 1, 2)
    ]
    assert (scores[0] - scores[1]).abs().max() < 0.01 * (scores[0] - scores[2]).abs().max(), "rounding at most"
    assert not torch.equal(scores[0], scores[2])


class Weights(TrainerCallback):
    """Keeps the weights of before and after training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {name: x.detach().clone() for name, x in kwargs["model"].named_parameters()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updates = state.global_step
        self.unchanged = {name for name, x in kwargs["model"].named_parameters() if torch.equal(x, self.before[name])}


@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_a_run_of_one_update_trains(mock_folder: Path, warmup: float) -> None:
    pairs, weights = [{"prompt": "a", "chosen": "b", "rejected": "c"}], Weights()
    config = RewardModelConfig(warmup=warmup)
    train_reward_model(pairs, base=mock_folder, heldout=pairs, config=config, callbacks=[weights])
    assert weights.updates == 1
    assert not weights.unchanged


@pytest.mark.slow
def test_margin_and_centring_act(mock_folder: Path) -> None:
    far = [{**pair, "margin": 10.0} for pair in PAIRS]

    def gap_and_sum(**settings: Any) -> tuple[float, float]:
        model, _ = train_reward_model(far, mock_folder, config=replace(FAST, **settings))
        good, bad = model.score_texts(GOOD), model.score_texts(BAD)
        return (good - bad).mean().item(), (good + bad).square().mean().item()

    wider, nearer = [], []
    for seed in range(2):
        plain_gap, plain_sum = gap_and_sum(seed=seed)
        wider.append(gap_and_sum(seed=seed, use_margin=True)[0] - plain_gap)
        nearer.append(float(np.log(plain_sum / gap_and_sum(seed=seed, center_coefficient=1.0)[1])))
    assert_learns(wider, at_least=1.5, measured=Measured(mean=6.26, standard_deviation=0.77, runs=8))
    assert_learns(nearer, at_least=0.5, measured=Measured(mean=9.53, standard_deviation=1.6, runs=8))


def rated(chosen: str, rejected: str, margin: float = 0.0, cluster: int = 0) -> RatedPair:
    ids = [(*text.replace("bb", "BB").encode(), EOS) for text in (chosen, rejected)]
    return RatedPair(ids[0], ids[1], margin, 1.0, cluster)


GROUP = [rated("a", "bb", 1.0), rated("a", "ccc"), rated("bb", "ccc")]


def test_a_text_is_encoded_once_a_batch() -> None:
    batch = collate([*GROUP, rated("a", "bb", 2.0)])
    ids, lengths = batch["texts"]
    assert ids.tolist() == [[97, EOS, 0, 0], [66, 66, EOS, 0], [99, 99, 99, EOS]]
    assert lengths.tolist() == [2, 3, 4]
    assert batch["chosen"].tolist() == [0, 0, 1, 0]
    assert batch["rejected"].tolist() == [1, 2, 2, 1]
    assert batch["margin"].tolist() == [1.0, 0.0, 0.0, 2.0]


def test_the_mean_over_tokens_is_trained_too() -> None:
    model = RewardModel(AutoModelForSequenceClassification.from_config(mock_lm(num_labels=1).config), byte_tokenizer())
    batch = collate(GROUP)
    last, mean = (scores[:, 0] for scores in model.scorer(*batch["texts"]))
    # By hand: the score after each token of the longest text, which no padding touches.
    prefixes = [
        model.score(torch.tensor([[99, 99, 99, EOS][:length]]), torch.tensor([length])) for length in (1, 2, 3, 4)
    ]
    assert_close(last[-1:], prefixes[-1], terms=FORWARD, scale=1.0)
    assert_close(mean[-1:], sum(prefixes) / 4, terms=FORWARD, scale=1.0)


def test_the_optimiser_moves_matrices_by_muon_and_the_rest_by_adamw() -> None:
    model = RewardModel(AutoModelForSequenceClassification.from_config(mock_lm(num_labels=1).config), byte_tokenizer())
    optimizer = MuonAndAdamW(model.scorer, RewardModelConfig().resolved("tiny"))
    by_muon, by_adamw = ({id(p) for p in part.param_groups[0]["params"]} for part in optimizer.parts)
    assert not by_muon & by_adamw
    assert len(by_muon | by_adamw) == len(list(model.model.parameters()))
    names = {name for name, parameter in model.model.named_parameters() if id(parameter) in by_adamw}
    assert {name.split(".")[-2] for name in names if "norm" not in name} == {"embed_tokens", "score"}
    # Schedulers write into the groups that both parts step with.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.clone() for parameter in model.model.parameters()]
    model.model.requires_grad_(True)
    model.scorer(torch.tensor([[97, EOS]]), torch.tensor([2])).last.sum().backward()
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.model.parameters(), strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert sum(not torch.equal(*pair) for pair in zip(before, model.model.parameters(), strict=True)) == len(by_muon)


class CountSteps(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def test_callbacks_of_transformers_are_called(mock_folder: Path) -> None:
    count = CountSteps()
    train_reward_model(
        PAIRS, mock_folder, config=RewardModelConfig(epochs=1, batch_size=4), heldout=PAIRS, callbacks=[count]
    )
    assert count.steps == 4


def test_the_one_thread_is_given_back(mock_folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    train_reward_model(PAIRS[:1], mock_folder, config=RewardModelConfig(epochs=1))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


TRL = json.loads(Path(__file__).with_name("trl_reward_loss.json").read_text())


@pytest.mark.parametrize("case", TRL["cases"])
def test_loss_is_that_of_trl_on_the_same_logits(case: dict[str, Any]) -> None:
    """TRL 1.16's own numbers, recorded by scripts/peers/record_reward_loss.py."""
    assert TRL["trl"] == "1.16.0"
    chosen, rejected = torch.tensor(case["scores"]).chunk(2)
    margin = None if case["margin"] is None else torch.tensor(case["margin"])
    loss = pairwise_loss(chosen, rejected, margin, case["center_coefficient"] or 0.0)
    assert_close(loss, case["loss"], terms=len(chosen), scale=max(1.0, *map(abs, case["scores"])))


def test_label_smoothing_and_graded_preferences_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0])
    up, down = (torch.nn.functional.logsigmoid(sign * (chosen - rejected)) for sign in (1, -1))
    smooth = pairwise_loss(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(smooth, -(0.9 * up + 0.1 * down).mean())
    p = torch.tensor([0.7, 0.5])
    torch.testing.assert_close(pairwise_loss(chosen, rejected, probability=p), -(p * up + (1 - p) * down).mean())
    # The best score of a graded preference is that of its probability, and certain pairs pull for ever.
    difference = torch.logit(torch.tensor(0.7)).requires_grad_(True)
    pairwise_loss(difference[None], torch.zeros(1), probability=p[:1]).backward()
    assert abs(difference.grad.item()) < 1e-6


@pytest.mark.slow
def test_graded_preferences_are_learned_as_such(mock_folder: Path) -> None:
    """Raters who are split leave the scores close; with certainty the same pairs are driven apart.

    A probability of 0.55 is that of a gap of 0.20; over 8 seeds it is 0.199 +- 0.0025, and random at the start.
    """
    pairs = [{**pair, "probability": 0.55} for pair in PAIRS]

    def gap(seed: int, use_probability: bool) -> float:
        config = replace(FAST, seed=seed, use_probability=use_probability)
        model, _ = train_reward_model(pairs, mock_folder, config=config, heldout=pairs)
        return float((model.score_texts(GOOD) - model.score_texts(BAD)).mean())

    certain = [gap(seed, use_probability=False) for seed in range(2)]
    assert_learns(certain, at_least=4.5, measured=Measured(mean=10.53, standard_deviation=0.86, runs=8))
    split = [gap(seed, use_probability=True) for seed in range(2)]
    assert np.abs(np.array(split) - 0.2).max() < 0.05


def test_learning_rates_depend_on_the_trunk() -> None:
    tiny, other = (RewardModelConfig().resolved(base) for base in ("tiny", "some/other"))
    assert (tiny.matrix_learning_rate, tiny.learning_rate) == (0.02, 0.01)
    assert (other.matrix_learning_rate, other.learning_rate) == (0.0, 2e-5)
    assert RewardModelConfig(learning_rate=0.5).resolved("tiny").learning_rate == 0.5
    model = RewardModel(AutoModelForSequenceClassification.from_config(mock_lm(num_labels=1).config), byte_tokenizer())
    assert [type(part) for part in MuonAndAdamW(model.scorer, other).parts] == [torch.optim.AdamW] * 2


TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"


def test_preferences_in_every_format_of_trl(mock_folder: Path) -> None:
    """Standard and conversational, with the prompt apart or within: one text, one reward model."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(mock_folder)

    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    asked = says("user", "Is it good?")
    formats: dict[str, Any] = {
        "standard": {"prompt": "<u>Is it good?<a>", "chosen": "yes", "rejected": "no"},
        "standard, no prompt": {"chosen": "<u>Is it good?<a>yes", "rejected": "<u>Is it good?<a>no"},
        "conversational": {"prompt": asked, "chosen": says("assistant", "yes"), "rejected": says("assistant", "no")},
        "conversational, no prompt": {
            "chosen": asked + says("assistant", "yes"),
            "rejected": asked + says("assistant", "no"),
        },
    }
    scores = []
    for pair in formats.values():
        model, _ = train_reward_model(
            [{**pair, "group": 0}] * 4, mock_folder, config=replace(FAST, epochs=1), heldout=[pair]
        )
        scores.append(model.score_texts(["<u>Is it good?<a>yes", "<u>Is it good?<a>no"]))
        assert pairwise_accuracy(model, [pair]) == float(scores[-1][0] > scores[-1][1])
    for other in scores[1:]:
        assert_close(other, scores[0], terms=FORWARD)


def test_a_batch_that_stands_in_for_an_empty_one_has_no_weight() -> None:
    """One pair for two processes."""
    pairs = [RatedPair((97,), (98,), 0.0, 1.0, 0)]
    objective = PairwiseObjective(FAST)
    weights = []
    for process in range(2):
        batches = SharedBatches(ClusterSampler([0], seed=0), 4, None, 2, process)
        [batch] = SharedLoader(batches, lambda chosen: objective.collate([pairs[index] for index in chosen]))
        weights.append(RewardTrainer._weight(SimpleNamespace(objective=objective), batch))  # type: ignore[arg-type]
    assert sorted(weights) == [0, 1]


def test_pairs_of_a_cluster_follow_each_other_and_all_are_seen_once_an_epoch() -> None:
    clusters = [index % 7 for index in range(100)]
    sampler = ClusterSampler(clusters, seed=0)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert sorted(order) == list(range(100))
        assert len([key for key, _ in itertools.groupby(clusters[index] for index in order)]) == 7
    assert list(ClusterSampler(clusters, seed=0)) == epochs[0]
    assert list(ClusterSampler(clusters, seed=2)) not in epochs


def test_a_step_that_is_not_finite_is_refused(mock_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[torch.nn.Module] = []

    def spoilt(chosen: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return chosen.sum() * math.nan

    class Remember(TrainerCallback):
        def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            trained.append(model)

    monkeypatch.setattr("textgym.rewards.models.pairwise.pairwise_loss", spoilt)
    with pytest.raises(NonFiniteError, match="the gradient norm of step 1 is nan"):
        train_reward_model(PAIRS, mock_folder, config=FAST, callbacks=[Remember()])
    assert all(weight.isfinite().all() for weight in trained[0].parameters())


def test_texts_whose_lengths_differ_by_a_hundred_times_are_trained_on_as_if_alone(mock_folder: Path) -> None:
    model = RewardModel.from_pretrained("tiny")
    short, long = "good", "bad " * 300
    together = model.score_texts([short, long])
    for score, text in zip(together, (short, long), strict=True):
        assert_close(score, model.score_texts([text])[0], terms=FORWARD, scale=10.0)
    config = RewardModelConfig(allow_faulty_rows=1.0)  # the long one is longer than the model has positions
    trained = train_reward_model([{"chosen": short, "rejected": long}] * 2, mock_folder, config=config)[0]
    assert all(weight.isfinite().all() for weight in trained.model.parameters())
