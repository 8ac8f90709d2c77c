"""Tokenizers, vocabularies and stop tokens are compared with the model's, and errors name both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from textgym.models.actor_critic import ActorCritic
from textgym.models.fitting import check_stop_ids, check_tokenizer, known_of_model, stop_ids, tokenizer_of
from textgym.models.loading import load_tokenizer
from textgym.testing import byte_tokenizer, letter_tokenizer, mock_lm


def saved(folder: Path, *, vocab_size: int = 258, with_tokenizer: bool = True) -> ActorCritic:
    """A policy that was loaded from a folder."""
    lm = mock_lm(vocab_size, num_layers=1)
    lm.generation_config.eos_token_id = [256, 10]
    lm.save_pretrained(folder)
    if with_tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return ActorCritic.from_pretrained(folder)


def test_a_policy_has_the_tokenizer_that_is_saved_beside_its_weights(tmp_path: Path) -> None:
    own = tokenizer_of(saved(tmp_path / "both").lm)
    assert own is not None
    assert own.get_vocab() == byte_tokenizer().get_vocab()
    assert tokenizer_of(saved(tmp_path / "weights", with_tokenizer=False).lm) is None
    assert tokenizer_of(mock_lm()) is None


def test_padding_of_the_models_vocabulary_is_right_and_a_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    padded = saved(tmp_path, vocab_size=300)
    check_tokenizer(byte_tokenizer(), padded.lm, padded.vocab_size)
    with pytest.raises(ValueError, match=r"the policy .* has 257 tokens, and the tokenizer .* has 258.*'<pad>'"):
        check_tokenizer(byte_tokenizer(), mock_lm(257), 257)


def test_added_tokens_are_right_if_the_model_has_room_for_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    padded = saved(tmp_path / "padded", vocab_size=300)
    check_tokenizer(tokenizer, padded.lm, padded.vocab_size)
    exact = saved(tmp_path / "exact")
    with pytest.raises(ValueError, match="'<think>'"):
        check_tokenizer(tokenizer, exact.lm, exact.vocab_size)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path) -> None:
    policy = saved(tmp_path)
    swapped = byte_tokenizer()
    state = swapped.backend_tokenizer.to_str().replace('"a":97', '"a":98').replace('"b":98', '"b":97')
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(state)
    assert len(swapped) == len(byte_tokenizer())
    with pytest.raises(ValueError, match="id 97 is 'a' there and 'b' here"):
        check_tokenizer(swapped, policy.lm, policy.vocab_size)
    with pytest.raises(ValueError, match="another tokenizer"):
        check_tokenizer(letter_tokenizer(), policy.lm, policy.vocab_size)


def test_all_stop_tokens_of_the_generation_config_are_known(tmp_path: Path) -> None:
    policy = saved(tmp_path, vocab_size=300)
    assert stop_ids(policy.lm) == (256, 10)
    assert known_of_model(load_tokenizer(tmp_path)) == (300, (256, 10))
    assert known_of_model(byte_tokenizer()) == (0, ())
    with pytest.raises(
        ValueError, match=r"stop tokens \[300\] are outside the vocabulary of the policy, which has 300"
    ):
        check_stop_ids([5, 300], 300, "the policy")


def test_a_folder_that_is_written_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        tokenizer = byte_tokenizer() if folder == "first" else letter_tokenizer(5)
        tokenizer.save_pretrained("same")
        assert len(load_tokenizer("same")) == len(tokenizer)
    letter_tokenizer(7).save_pretrained("same")
    assert len(load_tokenizer("same")) == 7
