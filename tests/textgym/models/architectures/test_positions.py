"""Texts that are too long for a model, and rotary embeddings that change with the length, are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, T5Config

from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures import support
from textgym.models.architectures.positions import position_limit
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.distributions.log_probs import StopRule
from textgym.models.token_model import TokenModel
from textgym.testing import mock_lm, mock_seq2seq_lm

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("rope", "positions", "named"),
    [
        (LONGROPE, 64, "beyond 16 tokens"),
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, 16, "beyond 16 tokens"),
    ],
)
def test_rotary_embeddings_that_change_with_the_length_are_refused(
    rope: dict[str, Any], positions: int, named: str
) -> None:
    lm = mock_lm(rope_parameters=rope, max_position_embeddings=positions)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM has rotary embeddings of type '\w+'.*{named}"):
        ActorCritic.from_pretrained(lm)


def test_longrope_is_taken_up_to_its_original_length_if_its_factors_do_not_change() -> None:
    lm = mock_lm(rope_parameters={**LONGROPE, "long_factor": LONGROPE["short_factor"]}, max_position_embeddings=64)
    model = TokenModel(lm)
    assert position_limit(lm.config) == 16
    ids = torch.randint(256, (1, 16))
    decoder = CachedDecoder(lm, 1, 16)
    for size in range(1, 17):
        cached = model.head(decoder.advance(ids, torch.tensor([size])))
        expected = lm(input_ids=ids[:, :size], use_cache=False).logits[:, -1]
        torch.testing.assert_close(cached, expected, rtol=0.0, atol=1e-4)


def test_the_limit_is_that_of_the_config_and_of_scaled_rotary_embeddings() -> None:
    assert position_limit(GPT2Config(n_positions=48)) == 48
    assert position_limit(T5Config()) is None  # relative positions
    assert position_limit(AutoConfig.for_model("llama", max_position_embeddings=40)) == 40
    assert position_limit(AutoConfig.for_model("llama", max_position_embeddings=32, rope_parameters=YARN)) == 128


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_contexts_and_responses_beyond_the_positions_are_refused(architecture: str) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(architecture=architecture, max_position_embeddings=20))
    ids = torch.randint(256, (2, 24))
    mask = torch.arange(24) < torch.tensor([[5], [21]])
    with pytest.raises(ValueError, match=r"a context has up to 21 tokens, and the model .* has positions for 20"):
        policy.act({"input_ids": ids, "attention_mask": mask.long()})
    with pytest.raises(ValueError, match="a prompt and its response has up to 23 tokens"):
        policy.generate(ids, torch.tensor([5, 7]), max_new_tokens=16, stop=StopRule((256,)))


def test_prompts_beyond_the_positions_of_an_encoder_are_refused() -> None:
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm(architecture="bart", max_position_embeddings=20))
    ids, mask = torch.randint(256, (1, 24)), torch.ones(1, 24, dtype=torch.long)
    start = torch.tensor([policy.decoder_start_ids])
    observation = {"input_ids": ids, "attention_mask": mask}
    observation |= {"decoder_input_ids": start, "decoder_attention_mask": torch.ones_like(start)}
    with pytest.raises(ValueError, match="a prompt has up to 24 tokens"):
        policy.act(observation)


def test_models_of_one_structure_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    trial = support._try_causal
    monkeypatch.setattr(support, "_passed", set())
    monkeypatch.setattr(support, "_try_causal", lambda lm, head, n: tried.append(n) or trial(lm, head, n))
    for seed in (0, 1):
        TokenModel(mock_lm(seed=seed))
    TokenModel(mock_lm(num_layers=1))
    TokenModel(mock_lm(architecture="mistral", sliding_window=40))
    assert tried == [24, 24, 44]
