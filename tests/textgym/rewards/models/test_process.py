"""ProcessRewardModel: which tokens are scored, by which of the model's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel

from textgym.envs.text import TextEnv
from textgym.rewards.models import ProcessRewardModel
from textgym.testing import byte_tokenizer, check_reward, letter_tokenizer, mock_lm, terms_of, tolerance

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs

EOS = 256


def classifier(num_labels: int = 2, architecture: str = "gpt2") -> PreTrainedModel:
    """A tiny random token classifier, with absolute positions by default."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForTokenClassification.from_config(
            mock_lm(architecture=architecture, num_labels=num_labels).config
        )


def by_hand(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0].detach()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_every_token_is_scored_whatever_the_batch(architecture: str) -> None:
    model = classifier(architecture=architecture)
    reward = ProcessRewardModel(model, byte_tokenizer(), separator=None)
    prompts, completions = [[97, 98], [99]], [[100, EOS], [101, 102, 103, 104, 105]]
    given = reward(prompt_ids=prompts, completion_ids=completions)
    for prompt, completion, scores in zip(prompts, completions, given, strict=True):
        expected = by_hand(model, prompt + completion).softmax(-1)[len(prompt) :, -1]
        assert scores == pytest.approx(expected.tolist(), abs=ROUNDING)


def test_steps_are_scored_at_the_token_that_completes_the_separator() -> None:
    model = classifier()
    reward = ProcessRewardModel(model, byte_tokenizer(), separator=";\n", label=0)
    completion = [*b"a;\nb;c;\nd", EOS]
    scores = reward(prompt_ids=[[97]], completion_ids=[completion])[0]
    expected = by_hand(model, [97, *completion]).softmax(-1)[1:, 0].tolist()
    ends = [2, 7, 9]  # both separators, and the end
    assert [index for index, score in enumerate(scores) if score] == ends
    assert [scores[index] for index in ends] == pytest.approx([expected[index] for index in ends], abs=ROUNDING)


def test_an_end_that_adds_nothing_is_no_step() -> None:
    reward = ProcessRewardModel(classifier(), byte_tokenizer(), separator="\n")
    for completion, ends in (([*b"a\n", EOS], [1]), ([*b"a\nb", EOS], [1, 3]), ([*b"a", EOS], [1]), ([*b"a\n"], [1])):
        scores = reward(prompt_ids=[[97]], completion_ids=[completion])[0]
        assert [index for index, score in enumerate(scores) if score] == ends


def test_long_rows_lose_their_beginning() -> None:
    reward = ProcessRewardModel(classifier(), byte_tokenizer(), separator=None, max_length=4)
    scores = reward(prompt_ids=[[97] * 50, [97]], completion_ids=[[98, 99], [98] * 6])
    assert scores[0] == pytest.approx(reward(prompt_ids=[[97] * 2], completion_ids=[[98, 99]])[0], abs=ROUNDING)
    assert [bool(score) for score in scores[1]] == [False, False, True, True, True, True]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_label_is_counted_from_either_end(num_labels: int) -> None:
    model = classifier(num_labels).eval()
    expected = by_hand(model, [97, 98]).softmax(-1)[1].tolist()
    for label in range(-num_labels, num_labels):
        reward = ProcessRewardModel(model, byte_tokenizer(), separator=None, label=label)
        assert reward(prompt_ids=[[97]], completion_ids=[[98]])[0] == pytest.approx([expected[label]], abs=ROUNDING)
    for label in (-num_labels - 1, num_labels):
        with pytest.raises(ValueError, match=f"the model has {num_labels} labels and none with the index {label}"):
            ProcessRewardModel(model, byte_tokenizer(), label=label)


def test_a_single_output_is_taken_as_it_is() -> None:
    model = classifier(num_labels=1)
    scores = ProcessRewardModel(model, byte_tokenizer(), separator=None)(prompt_ids=[[97]], completion_ids=[[98, 99]])
    assert scores[0] == pytest.approx(by_hand(model, [97, 98, 99])[1:, 0].tolist(), abs=ROUNDING)


def test_it_is_a_token_level_reward(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = ProcessRewardModel.from_pretrained(tmp_path, separator=None)
    env = TextEnv(["ab"], byte_tokenizer(), reward, max_prompt_tokens=4, max_new_tokens=3)
    env.reset()
    for token in (98, 99, EOS):
        _, score, *_ = env.step(token)
    last = env.task.last[0]
    assert last is not None
    assert score == pytest.approx(last.rewards.sum())
    assert last.score == pytest.approx(score)
    with pytest.raises(ValueError, match="its tokenizer differs from the policy's"):
        TextEnv(["ab"], letter_tokenizer(), reward)
    with pytest.raises(ValueError, match="no trained reward head"):
        ProcessRewardModel.from_pretrained(_language_model(tmp_path))


def _language_model(folder: Path) -> Path:
    mock_lm().save_pretrained(folder / "lm")
    return folder / "lm"


@pytest.mark.slow
def test_awkward_texts() -> None:
    model = ProcessRewardModel(classifier(), byte_tokenizer(), separator=" ")
    assert check_reward(model, tokenizer=byte_tokenizer(), timeout=1200) == []  # a busy machine is slow


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="the separator is empty"):
        ProcessRewardModel(classifier(), byte_tokenizer(), separator="")
    with pytest.raises(ValueError, match="none with the index 5"):
        ProcessRewardModel(classifier(), byte_tokenizer(), label=5)


def test_it_is_frozen() -> None:
    model: Any = classifier().train()
    reward = ProcessRewardModel(model, byte_tokenizer())
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
