"""CachedDecoder against full recomputation, on nine architectures."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor

from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.testing import assert_close, mock_lm, terms_of

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {**SMALL, "num_key_value_heads": 4}
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "qwen3": lambda: tf.Qwen3Config(**SMALL),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=7),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SMALL, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
    "phi3": lambda: tf.Phi3Config(**{k: v for k, v in MHA.items() if k != "head_dim"}),
    "smollm3": lambda: tf.SmolLM3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
}


FAST = ("gpt2", "llama", "gemma3", "phi3")
"""Learned and rotary positions, windows, fused projections; the others are like one of these."""


def random_lm(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in lm.parameters():  # larger than the default initialisation, so that errors show
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return lm


@torch.no_grad()
def full_logits(lm: torch.nn.Module, row: Tensor) -> Tensor:
    """One row alone, unpadded, without a cache, and with the model's own masks."""
    return lm(input_ids=row[None], use_cache=False).logits[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CONFIGS]
)
def test_cached_decoding_equals_full_recomputation(name: str) -> None:
    lm = random_lm(name)
    rows, width, steps = 5, 40, 60
    rng = torch.Generator().manual_seed(1)
    decoder = CachedDecoder(lm, rows, width)
    ids = torch.randint(97, (rows, width), generator=rng)
    lengths = torch.tensor([1, 3, 9, 2, 17])
    restarts = 0
    for _ in range(steps):
        logits = lm.get_output_embeddings()(decoder.advance(ids, lengths))
        for row in range(rows):
            expected = full_logits(lm, ids[row, : lengths[row]])[-1]
            assert_close(logits[row], expected, terms=FORWARD)
        lengths = lengths + torch.randint(0, 2, (rows,), generator=rng)  # some rows wait
        restart = (torch.rand(rows, generator=rng) < 0.1) | (lengths > width)
        lengths = torch.where(restart, torch.randint(1, 12, (rows,), generator=rng), lengths)
        ids[restart] = torch.randint(97, (int(restart.sum()), width), generator=rng)
        restarts += int(restart.sum())
    assert restarts > 10


def test_any_observation_is_legal() -> None:
    """Shrunk, jumped and edited contexts are encoded anew."""
    lm = mock_lm()
    decoder = CachedDecoder(lm, 2, 12)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(97, (2, 12), generator=rng)
        lengths = torch.randint(1, 13, (2,), generator=rng)
        hidden = decoder.advance(ids, lengths)
        for row in range(2):
            expected = full_logits(lm, ids[row, : lengths[row]])[-1]
            assert_close(lm.get_output_embeddings()(hidden[row]), expected, terms=FORWARD)


def test_a_step_costs_one_token_a_row() -> None:
    """Counted in forward positions: a grown row costs one, an unchanged row none."""
    lm = mock_lm()
    positions = []
    lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    decoder = CachedDecoder(lm, 3, 10)
    ids = torch.randint(97, (3, 10))
    for lengths in ([4, 4, 4], [5, 5, 5], [6, 5, 6], [6, 5, 6], [7, 6, 1]):
        decoder.advance(ids, torch.tensor(lengths))
    assert positions == [12, 3, 2, 1, 2]


def test_a_weight_update_empties_the_cache() -> None:
    lm = mock_lm()
    decoder = CachedDecoder(lm, 1, 8)
    ids = torch.randint(97, (1, 8))
    decoder.advance(ids, torch.tensor([5]))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.1)
    lm(input_ids=ids).logits.square().sum().backward()
    optimizer.step()
    logits = lm.get_output_embeddings()(decoder.advance(ids, torch.tensor([6])))
    assert_close(logits[0], full_logits(lm, ids[0, :6])[-1], terms=FORWARD)


def test_errors_say_what_is_wrong() -> None:
    decoder = CachedDecoder(mock_lm(), 2, 8)
    with pytest.raises(ValueError, match="expected input_ids of shape"):
        decoder.advance(torch.zeros(2, 9, dtype=torch.long), torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="context is empty"):
        decoder.advance(torch.zeros(2, 8, dtype=torch.long), torch.tensor([1, 0]))
