"""RewardModel on any sequence classifier: labels, chat templates, precision, batches of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from textgym.models.architectures.attention import MAX_PADDING, batches_by_length
from textgym.rewards.models import RewardModel
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

EOS = 256
TEXTS = ["good", "a much longer text than the others are", "bad film", "x"]
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"


def classifier(num_labels: int = 1, kind: str = "llama", **config: Any) -> PreTrainedModel:
    if kind == "bert":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        settings: Any = BertConfig(vocab_size=258, num_labels=num_labels, initializer_range=0.2, **shape, **config)
    else:
        settings = mock_lm(architecture=kind, num_labels=num_labels, **config).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(settings).eval()


def logits_of(model: PreTrainedModel, text: str, *ending: int) -> torch.Tensor:
    model.config.pad_token_id = None  # transformers' own forward then reads the last position
    return model(torch.tensor([[*text.encode(), *ending]])).logits[0].detach()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_label_that_is_chosen_counts(kind: str) -> None:
    names = {"id2label": {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}, "label2id": {}}
    model = classifier(3, kind, **names)
    settings: dict[str, Any] = {"append_eos": kind != "bert"}
    logits = logits_of(model, "film", *([EOS] if kind != "bert" else []))
    for label in (2, "POSITIVE"):
        reward = RewardModel(model, byte_tokenizer(), label=label, **settings)
        assert reward([""], ["film"]) == pytest.approx([logits[2].item()], abs=ROUNDING)
    probability = RewardModel(model, byte_tokenizer(), label="NEUTRAL", output="probability", **settings)
    assert probability([""], ["film"]) == pytest.approx([logits.softmax(-1)[1].item()], abs=ROUNDING)


def test_probability_where_labels_do_not_exclude_each_other() -> None:
    several = classifier(2, problem_type="multi_label_classification")
    reward = RewardModel(several, byte_tokenizer(), label=1, output="probability")
    assert reward([""], ["film"])[0] == pytest.approx(logits_of(several, "film", EOS)[1].sigmoid().item(), abs=ROUNDING)
    one = classifier()
    reward = RewardModel(one, byte_tokenizer(), output="probability")
    assert reward([""], ["film"])[0] == pytest.approx(logits_of(one, "film", EOS)[0].sigmoid().item(), abs=ROUNDING)


def test_a_label_has_to_be_chosen() -> None:
    model = classifier(2)
    for label in (None, 5, "POSITIVE"):
        with pytest.raises(ValueError, match="choose the one that is the reward"):
            RewardModel(model, byte_tokenizer(), label=label)
    with pytest.raises(ValueError, match="label must be a whole number or a string or None, got True"):
        RewardModel(model, byte_tokenizer(), label=True)
    with pytest.raises(ValueError, match="output must be 'logit' or 'probability'"):
        RewardModel(model, byte_tokenizer(), label=1, output="odds")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_all_settings_survive_saving(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"label": 1, "output": "probability", "include_prompt": False, "append_eos": False}
    model = RewardModel(classifier(2, kind), byte_tokenizer(), **settings)
    model.save_pretrained(tmp_path / "saved")
    loaded = RewardModel.from_pretrained(tmp_path / "saved")
    assert loaded(["a "], ["film"]) == model(["a "], ["film"]) == model(["other "], ["film"])
    other = RewardModel.from_pretrained(tmp_path / "saved", label=0)
    assert other(["a "], ["film"])[0] == pytest.approx(1 - model(["a "], ["film"])[0], abs=ROUNDING)


def test_an_encoder_whose_head_was_never_trained_is_refused(tmp_path: Path) -> None:
    classifier(kind="bert").base_model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained reward head .missing: classifier.bias, classifier.weight"):
        RewardModel.from_pretrained(tmp_path)


def test_bf16_on_loading(tmp_path: Path) -> None:
    model = RewardModel(classifier(), byte_tokenizer())
    model.save_pretrained(tmp_path / "saved")
    half = RewardModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, device="cpu")
    assert half.model.dtype == torch.bfloat16
    torch.testing.assert_close(half.score_texts(TEXTS), model.score_texts(TEXTS), atol=0.1, rtol=0.1)


# --- conversations ---


def test_conversations_are_read_through_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = classifier()
    reward = RewardModel(model, tokenizer)
    prompt, completion = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
    expected = pytest.approx([logits_of(model, "<u>hi<a>yo", EOS).item()], abs=ROUNDING)
    assert reward([prompt], [completion]) == expected
    assert reward([prompt], ["yo"]) == expected
    assert reward.score_texts([prompt + completion]).tolist() == expected
    chat = RewardModel(model, tokenizer, chat=True)
    assert chat(["hi"], ["yo"]) == expected, "plain texts as the two turns"
    assert not chat.share_ids_with(tokenizer), "the template's tokens are not the policy's"
    with pytest.raises(ValueError, match="no chat template"):
        RewardModel(model, byte_tokenizer())([prompt], [completion])


def test_conversations_are_read_by_the_models_own_template_though_ids_are_shared() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    reward = RewardModel(classifier(), tokenizer)
    assert reward.share_ids_with(byte_tokenizer())
    prompt, completion = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
    ids = {"prompt_ids": [[1, 2]], "completion_ids": [[3, EOS]]}
    assert reward([prompt], [completion], **ids) == reward([prompt], [completion])
    assert reward(["hi"], ["yo"], **ids) != reward(["hi"], ["yo"])


def test_a_template_that_writes_eos_itself_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{% endfor %}", "<eos>\n{% endfor %}")
    reward = RewardModel(classifier(), tokenizer)
    assert reward.encode([[{"role": "user", "content": "hi"}]]) == [[*b"<u>hi", EOS, *b"\n"]]


def test_an_encoder_loses_the_beginning_of_long_texts() -> None:
    model = RewardModel(classifier(kind="bert", max_position_embeddings=16), byte_tokenizer(), append_eos=False)
    assert model.encode(["x" * 30 + "the end"]) == [[*b"x" * 9, *b"the end"]]
    assert model.tokenizer.truncation_side == "right", "as it was"


def test_a_foreign_model_with_a_chat_template_is_read_without_a_further_eos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    classifier().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not RewardModel.from_pretrained(tmp_path).append_eos
    assert RewardModel.from_pretrained(tmp_path, append_eos=True).append_eos


# --- batches ---


@pytest.mark.parametrize("lengths", [[1, 2, 3, 500], list(range(1, 300)), [7] * 100, [512], []])
def test_batches_hold_at_most_a_tenth_of_padding(lengths: list[int]) -> None:
    rows = [[0] * length for length in lengths]
    batches = batches_by_length([len(row) for row in rows], batch_size=64)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert len(sizes) <= 64
        assert 1 - sum(sizes) / (len(sizes) * max(sizes)) <= MAX_PADDING
    if lengths == [7] * 100:
        assert [len(batch) for batch in batches] == [64, 36]


def test_long_and_short_texts_score_as_they_do_alone() -> None:
    model = RewardModel(classifier(), byte_tokenizer())
    texts = ["x" * length for length in (1, 100, 3, 50, 101, 99, 2)]
    alone = torch.cat([model.score_texts([text]) for text in texts])
    assert_close(model.score_texts(texts), alone, terms=FORWARD)
