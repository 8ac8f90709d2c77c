"""Families of models: those that are decoded exactly, and those that are refused with a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from textgym.models.architectures.attention import PackedStates
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.token_model import TokenModel
from textgym.testing import assert_close, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

V = 97
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    **ENDS,
}
FULL_HEADS = {**LLAMA, "num_key_value_heads": 4}
HEAD = {**LLAMA, "head_dim": 8}
WINDOW = {**LLAMA, "sliding_window": 3}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FALCON = {k: v for k, v in LLAMA.items() if k not in ("intermediate_size", "num_key_value_heads")}
EXACT: dict[str, dict[str, Any]] = {
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "falcon": FALCON,
    "stablelm": FULL_HEADS,
    "phi": FULL_HEADS,
    "phi3": {**FULL_HEADS, "sliding_window": 3},
    "gemma": HEAD,
    "gemma2": {**MIXED, "head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {**LLAMA, "logit_scale": 0.25},
    "cohere2": {**MIXED, "logit_scale": 0.25},
    "granite": {**LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "granitemoe": {**EXPERTS, "logits_scaling": 4.0},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": MIXED,
    "starcoder2": WINDOW,
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "mixtral": {**EXPERTS, "sliding_window": 3},
    "olmoe": EXPERTS,
    "ministral": {**WINDOW, "head_dim": 8},
    "glm": HEAD,
    "glm4": HEAD,
    "helium": HEAD,
    "exaone4": {**MIXED, "head_dim": 8},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
    "mpt": ({"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "ALiBi"),
    "falcon with alibi": ({**FALCON, "alibi": True}, "ALiBi"),
    "mamba": ({"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}, "recurrent state"),
    "jamba": ({**LLAMA, "num_experts": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False}, "recurrent state"),
    "rwkv": ({"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}, "recurrent state"),
    "recurrent_gemma": ({**LLAMA, "num_hidden_layers": 3, "lru_width": 32}, "recurrent state"),
    "falcon_h1": ({**HEAD, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, "recurrent state"),
    "qwen3_next": ({**HEAD, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]}, "recurrent state"),
    "gpt_neo": (
        {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["local"], 2]]},
        "local attention",
    ),
    "llama4_text": ({**HEAD, **EXPERTS, "attention_chunk_size": 4}, "chunked_attention"),
}
SEQ2SEQ = {
    "vocab_size": V,
    "d_model": 32,
    **{f"{half}_layers": 1 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 32 for half in ("encoder", "decoder")},
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
REFUSED_ENCODER_DECODER: dict[str, tuple[dict[str, Any], str]] = {
    "led": ({**SEQ2SEQ, "attention_window": 4}, "local attention"),
    "bigbird_pegasus": (SEQ2SEQ, "local attention"),
    "t5gemma": ({"encoder": HEAD, "decoder": HEAD}, "local attention"),
    "switch_transformers": ({**T5, "num_experts": 4}, "drops tokens"),
    "nllb-moe": ({**SEQ2SEQ, "num_experts": 4}, "drops tokens"),
    "m2m_100": (SEQ2SEQ, "other logits from a cache"),  # it numbers positions by which tokens are not padding
    "prophetnet": ({"vocab_size": V, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}, "explicit"),
}
FAST = ("gptj", "falcon", "gemma2", "cohere", "granite", "mixtral", "qwen2")
FAST_REFUSED = ("bloom", "falcon with alibi", "mamba", "qwen3_next", "gpt_neo", "llama4_text")


def marked(names: Any, fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def random_lm(model_type: str, settings: dict[str, Any], auto_class: Any = AutoModelForCausalLM) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = auto_class.from_config(AutoConfig.for_model(model_type, **settings)).eval()
        for parameter in lm.parameters():  # larger than the default initialisation, so that errors show
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return lm


@pytest.mark.parametrize("name", marked(EXACT, FAST))
@torch.no_grad()
def test_families_that_are_taken_are_exact(name: str) -> None:
    """Packed and cached, beyond the window where there is one, and with logits scaled or capped as the model does."""
    lm = random_lm(name, EXACT[name])
    head = TokenModel(lm).head
    ids = torch.randint(3, V, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 6, 5])
    expected = [lm(input_ids=ids[row : row + 1, : lengths[row]], use_cache=False).logits[0] for row in range(3)]
    packed = head(PackedStates.whole(ids, lengths).hidden(lm))
    assert_close(packed, torch.stack([logits[-1] for logits in expected]), terms=FORWARD)
    decoder = CachedDecoder(lm, 3, 12)
    for missing in range(5, -1, -1):
        seen = (lengths - missing).clamp(min=1)
        logits = head(decoder.advance(ids, seen))
        for row in range(3):
            assert_close(logits[row], expected[row][seen[row] - 1], terms=FORWARD)


@pytest.mark.parametrize("name", marked(REFUSED, FAST_REFUSED))
def test_the_others_are_refused_with_a_sentence(name: str) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"\w+LM \w.*{reason}.* use a model whose every layer"):
        TokenModel(random_lm(name.split()[0], settings))


@pytest.mark.parametrize("name", marked(REFUSED_ENCODER_DECODER, ("led", "m2m_100")))
def test_the_other_encoder_decoder_models_are_refused_with_a_sentence(name: str) -> None:
    settings, reason = REFUSED_ENCODER_DECODER[name]
    with pytest.raises(ValueError, match=rf"\w+ForConditionalGeneration .*{reason}.* use a model whose every layer"):
        TokenModel(random_lm(name, settings, AutoModelForSeq2SeqLM))


def test_a_model_that_says_nothing_of_its_ways_is_found_out_by_trying() -> None:
    """ALiBi that no config names: the logits beside others and from the cache are not the model's own."""
    lm = random_lm("bloom", REFUSED["bloom"][0])
    lm.config.model_type = "unheard of"
    with pytest.raises(ValueError, match=r"BloomForCausalLM (gives other logits|does not take the explicit masks)"):
        TokenModel(lm)


def test_a_head_that_is_not_reproduced_is_found_out_by_trying() -> None:
    lm = random_lm("cohere", EXACT["cohere"])
    del lm.config.logit_scale
    with pytest.raises(ValueError, match="gives other logits packed beside others than by itself"):
        TokenModel(lm)


def test_the_architectures_in_the_docs_are_those_that_are_tested() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = page.split("## Supported architectures")[1].split("\n## ")[0]
    taken, refused = (
        {name for row in rows.splitlines() if row.startswith(f"| {kind}") for name in re.findall(r"`([\w-]+)`", row)}
        for kind in ("exact", "refused")
    )
    here = Path(__file__).parent
    elsewhere = "".join(
        (here / page).read_text()
        for page in ("decoding/test_cached_decoder.py", "architectures/test_encoder_decoder.py")
    )
    assert set(EXACT) <= taken
    assert all(f'"{name}"' in elsewhere for name in taken - set(EXACT))
    assert refused == {name.split()[0] for name in (*REFUSED, *REFUSED_ENCODER_DECODER)}
