"""`policy.generate` of texts: a text gives a text, and a list a list."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from textgym import ActorCritic
from textgym.errors import ConfigError
from textgym.models.distributions.sampling_rules import SamplingRules
from textgym.testing import byte_tokenizer, mock_lm, mock_seq2seq_lm

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def policy() -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm())


def written(policy: ActorCritic, prompts: Any, max_new_tokens: int = 8, **sampling: Any) -> Any:
    return policy.generate(prompts, max_new_tokens, tokenizer=TOKENIZER, **sampling)


def by_transformers(lm: Any, ids: list[int], number: int) -> list[int]:
    """The most likely tokens one after the other, each from a full pass."""
    for _ in range(number):
        token = int(lm(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]
        if token == TOKENIZER.eos_token_id:
            break
    return ids


def test_a_text_gives_a_text_and_a_list_gives_a_list(policy: ActorCritic) -> None:
    one = written(policy, "ab", deterministic=True)
    assert isinstance(one, str)
    assert written(policy, ["ab"], deterministic=True) == [one]
    both = written(policy, ["ab", "longer"], deterministic=True)
    assert both == [one, written(policy, "longer", deterministic=True)]


def test_the_most_likely_tokens_are_those_of_full_passes(policy: ActorCritic) -> None:
    prompt = TOKENIZER("ab", add_special_tokens=False).input_ids
    expected = by_transformers(policy.lm, prompt, 8)
    text = TOKENIZER.decode(expected[len(prompt) :], skip_special_tokens=True)
    assert written(policy, "ab", deterministic=True).encode() == text.encode()
    assert written(policy, "ab", top_k=1, seed=3) == written(policy, "ab", deterministic=True)
    assert written(policy, "ab", top_p=1e-6, seed=3) == written(policy, "ab", deterministic=True)


def test_samples_have_the_frequencies_of_the_tempered_and_filtered_distribution(policy: ActorCritic) -> None:
    # A prompt after which the three most likely tokens are letters, since half a character has no text.
    prompts = [[first, second] for first in range(97, 123) for second in range(97, 123)]
    logits = policy.lm(torch.tensor(prompts)).logits[:, -1] / 0.5
    likely = logits.topk(3).indices
    row = int(((likely > 32) & (likely < 127)).all(1).nonzero()[0])
    expected = logits[row, likely[row]].softmax(-1).tolist()
    number = 4000
    texts = written(policy, [bytes(prompts[row]).decode()] * number, 1, temperature=0.5, top_k=3, seed=0)
    for token, share in zip(likely[row].tolist(), expected, strict=True):
        error = (share * (1 - share) / number) ** 0.5
        assert texts.count(chr(token)) / number == pytest.approx(share, abs=5 * error)


def test_rules_of_the_policy_and_of_the_call_apply(policy: ActorCritic) -> None:
    plain = written(policy, "ab", 12, deterministic=True)
    ruled = written(policy, "ab", 12, deterministic=True, rules=SamplingRules(repetition_penalty=5.0))
    assert plain != ruled
    with_rules = ActorCritic(policy.lm, rules=SamplingRules(repetition_penalty=5.0))
    assert written(with_rules, "ab", 12, deterministic=True) == ruled


def test_a_seed_repeats_the_text_and_leaves_the_policys_own_random_numbers_alone(policy: ActorCritic) -> None:
    policy.seed(1)
    assert policy.generator is not None
    before = policy.generator.get_state()
    assert written(policy, "ab", seed=5) == written(policy, "ab", seed=5)
    assert policy.generator.get_state().equal(before)
    written(policy, "ab")
    assert not policy.generator.get_state().equal(before)


def test_a_text_ends_before_a_stop_string(policy: ActorCritic) -> None:
    whole = written(policy, "ab", 8, top_k=50, seed=2)
    assert len(whole) > 2
    stopped = written(policy, ["ab"], 8, top_k=50, seed=2, stop=[whole[2]])
    assert stopped == [whole[: whole.index(whole[2])]]


def test_encoder_decoder_models_write_texts(policy: ActorCritic) -> None:
    seq2seq = ActorCritic.from_pretrained(mock_seq2seq_lm())
    one, two = written(seq2seq, ["ab", "longer"], 4, deterministic=True)
    assert [one] == written(seq2seq, ["ab"], 4, deterministic=True)
    assert isinstance(two, str)


def test_what_is_missing_or_too_long_is_named(policy: ActorCritic) -> None:
    with pytest.raises(ConfigError, match="no tokenizer is saved with the policy's weights"):
        policy.generate("ab")
    with pytest.raises(ConfigError, match=r"exceeds the \d+ positions of the model"):
        written(policy, "ab", 10**6)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        written(policy, "ab", 0)
