"""`RewardModel` and `train_reward_model`."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from textgym.errors import ConfigError
from textgym.models.loading import load_classifier
from textgym.rewards.models import RewardModel, pairwise_accuracy, train_reward_model
from textgym.rewards.models.reward_model import RewardModelSettings
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

EOS, PAD = 256, 257
ARCHITECTURES = ["llama", "gpt2"]
TEXTS = ["good", "a much longer text than the others are", "bad film", "x", "so so, but well acted", "good!"]


def classifier(architecture: str = "llama", **config: Any) -> PreTrainedModel:
    """A tiny random sequence classifier; GPT-2 has absolute positions, Llama rotary ones."""
    settings = mock_lm(architecture=architecture, num_labels=1, **config).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(settings)


def bert() -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=258, max_position_embeddings=128, num_labels=1, initializer_range=0.2, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture(params=ARCHITECTURES)
def reward_model(request: pytest.FixtureRequest) -> RewardModel:
    return RewardModel(classifier(request.param), byte_tokenizer())


def by_hand(model: RewardModel, ids: list[int]) -> Tensor:
    """The score of one row: transformers' own forward over one unpadded row reads position -1 only without a pad id."""
    classifier = copy.deepcopy(model.model)
    classifier.config.pad_token_id = None
    return classifier(torch.tensor([ids])).logits[0, 0].detach()


def ids_of(text: str) -> list[int]:
    return list(text.encode())


# Reading the right token


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_right_padding_invariance(reward_model: RewardModel, padding: int) -> None:
    ids = [*ids_of("a film"), EOS]
    padded = torch.tensor([ids + [PAD] * padding, [*range(50, 50 + len(ids) + padding)]])
    scores = reward_model.score(padded, torch.tensor([len(ids), len(ids) + padding]))
    assert_close(scores[0], by_hand(reward_model, ids), terms=FORWARD, scale=1.0)


def test_pad_token_equal_to_eos(reward_model: RewardModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = RewardModel(reward_model.model, tokenizer)
    model.model.config.pad_token_id = EOS
    prompt = "<eos>one turn<eos>another"  # a rendered chat, in which EOS is a token like any other
    scores = torch.tensor(model([prompt, "x"], [" and more", " text that is a good deal longer than that"]))
    expected = by_hand(model, [EOS, *ids_of("one turn"), EOS, *ids_of("another and more"), EOS])
    assert_close(scores[0], expected, terms=FORWARD, scale=1.0)


def test_a_real_pad_id_is_read(reward_model: RewardModel) -> None:
    reward_model.share_ids_with(reward_model.tokenizer)
    for completion in ([65, PAD, 66, EOS], [65, PAD], [PAD, PAD, EOS]):
        score = reward_model(
            ["ab", "abcdefghij"], ["", ""], prompt_ids=[[97, 98], [97] * 10], completion_ids=[completion] * 2
        )
        real = completion[:-1] if completion[-1] == EOS else completion
        expected = by_hand(reward_model, [97, 98, *real, EOS])
        assert score[0] == pytest.approx(expected.item(), abs=ROUNDING)


def test_scores_are_fp32_whatever_the_dtype() -> None:
    full = RewardModel(classifier(), byte_tokenizer()).score_texts(TEXTS)
    half = RewardModel(classifier().to(torch.bfloat16), byte_tokenizer()).score_texts(TEXTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)  # the documented band: bf16 has three digits
    assert not torch.equal(half, half.to(torch.bfloat16).float()), "the head itself is read in fp32"


def test_a_row_alone_and_in_a_batch(reward_model: RewardModel) -> None:
    together = reward_model.score_texts(TEXTS)
    alone = torch.cat([reward_model.score_texts([text]) for text in TEXTS])
    reward_model.batch_size = 2
    assert_close(together, alone, terms=FORWARD)
    assert_close(reward_model.score_texts(TEXTS), alone, terms=FORWARD)


def test_scoring_leaves_the_model_frozen(reward_model: RewardModel) -> None:
    before = {name: value.clone() for name, value in reward_model.model.state_dict().items()}
    scores = reward_model.score_texts(TEXTS)
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in reward_model.model.parameters())
    assert not reward_model.model.training
    assert all(torch.equal(value, before[name]) for name, value in reward_model.model.state_dict().items())


def test_dropout_is_off() -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = RewardModel(classifier("gpt2", **dropout), byte_tokenizer())
    model.model.train()
    assert_close(model.score_texts(TEXTS), model.score_texts(TEXTS), terms=FORWARD)


def test_last_real_token_whatever_follows(reward_model: RewardModel) -> None:
    reward_model.share_ids_with(reward_model.tokenizer)
    prompt_ids = [ids_of("the "), ids_of("a rather longer prompt ")]
    endings = [[], [EOS], [EOS, 7, 8, 9], [EOS, EOS], [EOS, PAD, PAD]]  # by length, by EOS, and junk after EOS
    scores = [
        reward_model(["the ", "p"], ["", ""], prompt_ids=prompt_ids, completion_ids=[ids_of("film") + ending, [65]])
        for ending in endings
    ]
    assert scores[0][0] == pytest.approx(by_hand(reward_model, [*ids_of("the film"), EOS]).item(), abs=ROUNDING)
    for score in scores[1:]:
        assert score == pytest.approx(scores[0], abs=ROUNDING)
    texts = [reward_model(["the ", "p"], ["film" + end, "q"])[0] for end in ("", "<eos>", "<eos>junk", "<eos><eos>")]
    assert texts == pytest.approx([scores[0][0]] * 4, abs=ROUNDING)


def assert_same_weights(one: RewardModel, other: RewardModel) -> None:
    """Copies are exact; what is computed with them need not be: a file's weights may lie otherwise in memory."""
    expected = other.model.state_dict()
    assert one.model.state_dict().keys() == expected.keys()
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_bias_of_the_head_survives_saving(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.model.score = nn.Linear(32, 1, bias=True).requires_grad_(False)
    with torch.no_grad():
        reward_model.model.score.bias.fill_(1.5)
    before = reward_model.score_texts(TEXTS)
    reward_model.save_pretrained(tmp_path / "saved")
    loaded = RewardModel.from_pretrained(tmp_path / "saved")
    assert_same_weights(loaded, reward_model)
    assert_close(loaded.score_texts(TEXTS), before, terms=FORWARD)


def test_calibration_is_mean_0_deviation_1_and_saved(reward_model: RewardModel, tmp_path: Path) -> None:
    assert reward_model.calibrate(TEXTS) is reward_model
    scores = reward_model.score_texts(TEXTS)
    assert scores.mean().item() == pytest.approx(0, abs=ROUNDING)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=ROUNDING)
    reward_model.calibrate(TEXTS)  # a second time changes nothing
    assert_close(reward_model.score_texts(TEXTS), scores, terms=FORWARD)
    reward_model.save_pretrained(tmp_path / "saved")
    loaded = RewardModel.from_pretrained(str(tmp_path / "saved"))
    assert (loaded.gain, loaded.bias) == (reward_model.gain, reward_model.bias)
    assert_close(loaded.score_texts(TEXTS), reward_model.score_texts(TEXTS), terms=FORWARD)
    with pytest.raises(ValueError, match="score the same"):
        reward_model.calibrate(["one", "one"])


def test_shared_ids_are_not_decoded_and_encoded_again(reward_model: RewardModel) -> None:
    prompt, completion = [[97, 0xFF]], [[0xFE, 98, EOS]]  # not UTF-8: encode(decode(x)) != x
    tokenizer = reward_model.tokenizer
    texts = [tokenizer.decode(prompt[0])], [tokenizer.decode(completion[0][:-1])]
    from_text = reward_model(*texts, prompt_ids=prompt, completion_ids=completion)
    assert from_text == pytest.approx(reward_model(*texts), abs=ROUNDING), "nobody said that the ids are its own"
    assert reward_model.share_ids_with(byte_tokenizer())
    from_ids = reward_model(*texts, prompt_ids=prompt, completion_ids=completion)
    assert from_ids[0] == pytest.approx(by_hand(reward_model, [97, 0xFF, 0xFE, 98, EOS]).item(), abs=ROUNDING)
    assert from_ids != pytest.approx(from_text, abs=1e-3)


def test_ids_of_another_tokenizer_are_never_read(reward_model: RewardModel) -> None:
    other = byte_tokenizer()
    other.add_tokens(["film"])
    assert not reward_model.share_ids_with(other)
    assert reward_model.share_ids_with(byte_tokenizer())
    ids = {"prompt_ids": [[1, 2, 3]], "completion_ids": [[4, 5, 6]]}
    alone = reward_model(["a "], ["film"])
    assert reward_model(["a "], ["film"], **ids) == pytest.approx(alone, abs=ROUNDING)  # others still send theirs


# The reward function


def test_it_is_a_reward_function(reward_model: RewardModel) -> None:
    scores = reward_model(prompts=["a ", "b "], completions=["film", "play"], rating=[1, 2])
    assert reward_model.__name__ == "reward_model"
    assert isinstance(scores, list)
    assert all(isinstance(score, float) for score in scores)
    assert_close(scores, reward_model.score_texts(["a film", "b play"]), terms=FORWARD, scale=1.0)
    reward_model.gain, reward_model.bias = 2.0, -1.0
    assert reward_model(["a ", "b "], ["film", "play"]) == pytest.approx(
        [2 * score - 1 for score in scores], abs=ROUNDING
    )
    assert reward_model([], []) == []


def test_prompts_and_completions_of_different_numbers_are_refused(reward_model: RewardModel) -> None:
    with pytest.raises(ValueError, match="zip"):
        reward_model(["a ", "b "], ["film"])
    reward_model.share_ids_with(reward_model.tokenizer)
    with pytest.raises(ValueError, match="zip"):
        reward_model(["a ", "b "], ["film"], prompt_ids=[[97], [98]], completion_ids=[[99]])


def test_without_eos_the_text_is_read_as_it_is(reward_model: RewardModel) -> None:
    open_ended = RewardModel(reward_model.model, reward_model.tokenizer, append_eos=False)
    open_ended.share_ids_with(open_ended.tokenizer)
    expected = pytest.approx([by_hand(reward_model, ids_of("a film")).item()], abs=ROUNDING)
    assert open_ended(["a "], ["film"]) == expected
    ids = {"prompt_ids": [ids_of("a ")], "completion_ids": [[*ids_of("film"), EOS, 7]]}
    assert open_ended(["a "], ["film"], **ids) == expected
    with pytest.raises(ValueError, match="a text is empty"):
        open_ended([""], [""])


def test_a_text_that_ends_with_eos_gets_no_second_one(reward_model: RewardModel) -> None:
    rendered = "<eos>a film"  # a string that begins with a control token: those within count, too
    assert reward_model.encode([rendered, rendered + "<eos>"]) == [[EOS, *ids_of("a film"), EOS]] * 2


def test_long_texts_lose_their_beginning(reward_model: RewardModel) -> None:
    assert reward_model.max_length == 128, "the model has no more positions"
    short = RewardModel(reward_model.model, reward_model.tokenizer, max_length=5)
    assert short.encode(["a film"]) == [[*ids_of("film"), EOS]]
    shortest = RewardModel(reward_model.model, reward_model.tokenizer, max_length=2)
    assert shortest.encode(["a film"]) == [[*ids_of("m"), EOS]]
    with pytest.raises(ConfigError, match="max_length must be at least 2, a token and EOS, got 1"):
        RewardModel(reward_model.model, reward_model.tokenizer, max_length=1)
    assert len(reward_model.encode(["x" * 1000])[0]) == 128
    reward_model.score_texts(["x" * 1000])


def test_an_encoder_is_told_what_is_padding(tmp_path: Path) -> None:
    model = RewardModel(bert(), byte_tokenizer(), append_eos=False)
    alone = torch.cat([model.score_texts([text]) for text in TEXTS])
    assert_close(model.score_texts(TEXTS), alone, terms=FORWARD)
    assert not model.share_ids_with(model.tokenizer), "encoders put special tokens around the text"
    model.save_pretrained(tmp_path / "bert")
    torch.testing.assert_close(
        RewardModel.from_pretrained(tmp_path / "bert").score_texts(TEXTS), alone, atol=1e-5, rtol=0
    )


def test_copies_score_alike(reward_model: RewardModel) -> None:
    scores = reward_model.score_texts(TEXTS)
    for clone in (copy.deepcopy(reward_model), pickle.loads(pickle.dumps(reward_model))):
        assert_same_weights(clone, reward_model)
        assert_close(clone.score_texts(TEXTS), scores, terms=FORWARD)
        assert clone.model is not reward_model.model


def test_a_model_that_is_made_has_the_settings_of_one_that_is_saved_without_any() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(RewardModel).parameters.items()}
    settings = {field.name: field.default for field in fields(RewardModelSettings)}
    assert {name: given[name] for name in settings} == settings
    alone = (given["gain"], given["bias"])
    assert alone == (1.0, 0.0), "the score is the logit"


def test_what_cannot_be_a_reward_model_is_refused() -> None:
    two_labels = AutoModelForSequenceClassification.from_config(mock_lm(num_labels=2).config)
    with pytest.raises(ValueError, match="choose the one that is the reward"):
        RewardModel(two_labels, byte_tokenizer())
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="append_eos=False"):
        RewardModel(classifier(), tokenizer)


# Loading and saving


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    model = RewardModel(classifier(), byte_tokenizer(), gain=2.0, bias=0.5, append_eos=False, max_length=9)
    model.save_pretrained(tmp_path / "saved")
    loaded = RewardModel.from_pretrained(tmp_path / "saved")
    assert (loaded.gain, loaded.bias, loaded.append_eos, loaded.max_length) == (2.0, 0.5, False, 9)
    assert_same_weights(loaded, model)
    assert_close(loaded.score_texts(TEXTS), model.score_texts(TEXTS), terms=FORWARD)
    # It is a plain transformers folder besides.
    plain = load_classifier(tmp_path / "saved")(torch.tensor([ids_of("a film")])).logits[0, 0]
    assert plain.item() == pytest.approx(by_hand(model, ids_of("a film")).item(), abs=ROUNDING)


def test_saving_replaces_the_folder_whole(reward_model: RewardModel, tmp_path: Path) -> None:
    for gain in (1.0, 3.0):
        reward_model.gain = gain
        reward_model.save_pretrained(tmp_path / "saved", overwrite=True)
    assert RewardModel.from_pretrained(tmp_path / "saved").gain == 3.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel(classifier(), byte_tokenizer())
    model.save_pretrained(tmp_path / "old")
    model.gain = 7.0

    def fills_up(folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", fills_up)
    for name in ("old", "new"):
        with pytest.raises(OSError, match=f"could not write .*{name}"):
            model.save_pretrained(tmp_path / name, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert RewardModel.from_pretrained(tmp_path / "old").gain == 1.0, "what stood there still does"


def test_unknown_names_and_untrained_heads_are_clear_errors(tmp_path: Path, mock_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load a model called .*nowhere"):
        RewardModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"no trained reward head .missing: score.weight.: train one with train_reward_model"
    ):
        RewardModel.from_pretrained(mock_folder)


def test_saving_below_a_file_is_a_clear_error(reward_model: RewardModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        reward_model.save_pretrained(tmp_path / "file" / "saved")


# Training; the loss and the batches are tested in test_pairwise.py

PAIRS = [{"chosen": f"good {index}", "rejected": f"bad {index}", "group": index // 4} for index in range(16)]


def test_bad_preferences_are_clear_errors(mock_folder: Path) -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        train_reward_model([], mock_folder)
    with pytest.raises(ValueError, match=r"row 1 of the preferences has the keys \['chosen'\]"):
        train_reward_model([PAIRS[0], {"chosen": "a"}], mock_folder)


def test_pairwise_accuracy_counts_ties_as_half_and_scores_each_text_once() -> None:
    calls: list[str] = []

    def length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.extend(completions)
        return [float(len(completion)) for completion in completions]

    pairs = [
        {"chosen": "long", "rejected": "s"},
        {"chosen": "s", "rejected": "long"},
        {"chosen": "s", "rejected": "t"},
        {"chosen": "long", "rejected": "t"},
    ]
    assert pairwise_accuracy(length, pairs) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert sorted(calls) == ["long", "s", "t"]
