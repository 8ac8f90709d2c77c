"""Models part of the compatibility page: tiny random models of many architectures, exact or rejected.

A model is exact if the logits of every prefix of a text, up to the full length, are the same alone, packed with other
texts, and decoded token by token with the cache, in which rows restart. The full length is beyond sliding windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from textgym.models.architectures.attention import PackedStates
from textgym.models.architectures.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder
from textgym.models.token_model import TokenModel

V, WIDTH, WINDOW = 97, 48, 7
TOLERANCE = 1e-4
"""Maximum error of a logit, in standard deviations of the logits."""

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": WIDTH, **ENDS}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WIDTH,
    **ENDS,
}
MHA = {**LLAMA, "num_key_value_heads": 4}
HEAD = {**LLAMA, "head_dim": 8}
FALCON = {name: value for name, value in LLAMA.items() if name not in ("intermediate_size", "num_key_value_heads")}
SLIDING = {**LLAMA, "sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
ORIGINAL = {"original_max_position_embeddings": WIDTH // 4}
SMALL = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, **ENDS}
HALVES = {
    "vocab_size": V,
    "d_model": 32,
    **{f"{half}_layers": 1 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 32 for half in ("encoder", "decoder")},
    "max_position_embeddings": WIDTH,
    "decoder_start_token_id": 2,
    **ENDS,
}
LAYERS = ("num_encoder_layers", "num_decoder_layers")
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def rope(kind: str, **further: Any) -> dict[str, Any]:
    """Return Llama's settings with rotary embeddings that are scaled."""
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    return {**LLAMA, "rope_parameters": {**parameters, **further}}


CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", FALCON | {"intermediate_size": 48}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4}),
    "opt": ("opt", {**FALCON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "llama": ("llama", LLAMA),
    "llama, linear rope": ("llama", rope("linear")),
    "llama, YaRN rope": ("llama", rope("yarn", **ORIGINAL)),
    "llama, llama3 rope": ("llama", rope("llama3", **ORIGINAL, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama, dynamic NTK rope": ("llama", {**rope("dynamic"), "max_position_embeddings": WIDTH // 4}),
    "llama, longrope": ("llama", rope("longrope", **ORIGINAL, **FACTORS)),
    "phi3, longrope": (
        "phi3",
        {
            **MHA,
            "original_max_position_embeddings": WIDTH // 4,
            "rope_parameters": {"rope_type": "longrope", **FACTORS},
        },
    ),
    "mistral": ("mistral", {**SLIDING, "head_dim": 8}),
    "ministral": ("ministral", {**SLIDING, "head_dim": 8}),
    "mixtral": ("mixtral", {**EXPERTS, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", HEAD),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", {**MIXED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3_text": ("gemma3_text", {**MIXED, "head_dim": 8}),
    "cohere": ("cohere", {**LLAMA, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**MIXED, "logit_scale": 0.25}),
    "granite": ("granite", {**LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "granitemoe": ("granitemoe", {**EXPERTS, "logits_scaling": 4.0}),
    "olmo": ("olmo", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": ("olmo3", MIXED),
    "olmoe": ("olmoe", EXPERTS),
    "phi": ("phi", MHA),
    "phi3": ("phi3", {**MHA, "sliding_window": WINDOW}),
    "stablelm": ("stablelm", MHA),
    "starcoder2": ("starcoder2", SLIDING),
    "falcon": ("falcon", FALCON),
    "glm": ("glm", HEAD),
    "glm4": ("glm4", HEAD),
    "helium": ("helium", HEAD),
    "smollm3": ("smollm3", LLAMA),
    "exaone4": ("exaone4", {**MIXED, "head_dim": 8}),
    "bloom": ("bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4, **ENDS}),
    "mpt": ("mpt", {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": WIDTH, **ENDS}),
    "falcon, ALiBi": ("falcon", {**FALCON, "alibi": True}),
    "mamba": ("mamba", SMALL),
    "rwkv": ("rwkv", {**SMALL, "context_length": WIDTH}),
    "recurrent_gemma": ("recurrent_gemma", {**LLAMA, "num_hidden_layers": 3, "lru_width": 32}),
    "qwen3_next": ("qwen3_next", {**HEAD, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]}),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["local"], 2]]}
        | ENDS,
    ),
    "llama4_text": ("llama4_text", {**HEAD, **EXPERTS, "attention_chunk_size": 4}),
}
ENCODER_DECODER: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "umt5": ("umt5", T5),
    "bart": ("bart", HALVES),
    "mbart": ("mbart", HALVES),
    "pegasus": ("pegasus", HALVES),
    "marian": ("marian", HALVES),
    "led": ("led", {**HALVES, "attention_window": 4}),
    "switch_transformers": ("switch_transformers", {**T5, "num_experts": 4}),
    "m2m_100": ("m2m_100", HALVES),
    "prophetnet": ("prophetnet", {"vocab_size": V, "hidden_size": 32, **dict.fromkeys(LAYERS, 1), **ENDS}),
}


def section() -> str:
    """Check every model and return a table of the results."""
    rows = []
    for names, auto_class, difference in (
        (CAUSAL, AutoModelForCausalLM, causal_difference),
        (ENCODER_DECODER, AutoModelForSeq2SeqLM, encoder_decoder_difference),
    ):
        for name, (model_type, settings) in names.items():
            lm = random_lm(model_type, settings, auto_class)
            rows.append(f"| {name} | {type(lm).__name__} | {_result(lm, difference)} |")
    return "\n".join(
        [
            f"Tiny random models with {WIDTH} positions, and sliding windows of {WINDOW} where the architecture has",
            "them. Exact means that the logits of every prefix of a text are the same alone, packed beside others,",
            "and from the cache, also after rows restart. The figure is the largest difference, in standard deviations",
            "of the logits. A refusal is the error that loading the model raises.",
            "",
            "| model | class | result |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


def random_lm(model_type: str, settings: dict[str, Any], auto_class: Any) -> Any:
    """Return a tiny random model, with weights larger than those of its initialisation, so that errors show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = auto_class.from_config(AutoConfig.for_model(model_type, **settings)).eval()
        for parameter in lm.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return lm


def _result(lm: Any, difference: Any) -> str:
    try:
        model = TokenModel(lm)
    except ValueError as error:
        return f"refused: {' '.join(str(error).split()).removeprefix(type(lm).__name__).strip()}"
    largest = difference(model)
    return f"exact ({largest:.0e})" if largest < TOLERANCE else f"**wrong ({largest:.0e})**"


@torch.no_grad()
def causal_difference(model: TokenModel) -> float:
    """Return the errors of logits of packed and of cached contexts, in standard deviations of the logits."""
    lm, lengths = model.lm, torch.tensor([WIDTH, WIDTH // 2, 3, 1])
    ids = torch.randint(3, V, (len(lengths), WIDTH), generator=torch.Generator().manual_seed(1))
    own = _own_logits(lm, ids)
    differences = []

    for shorter in range(0, WIDTH, 5):
        sizes = (lengths - shorter).clamp(min=1)
        packed = model.head(PackedStates.whole(ids, sizes).hidden(lm))
        differences.append(_off(packed, own, sizes))

    decoder = CachedDecoder(lm, len(lengths), WIDTH)
    sizes = torch.tensor([1, 5, 2, 9])
    for step in range(2 * WIDTH):
        cached = model.head(decoder.advance(ids, sizes))
        differences.append(_off(cached, own, sizes))
        sizes = sizes + 1
        restarted = (sizes > WIDTH) | (torch.arange(len(lengths)) * 10 + 7 == step % WIDTH)
        sizes[restarted] = 1 + step % 4
    return max(differences)


@torch.no_grad()
def encoder_decoder_difference(model: TokenModel) -> float:
    """Return the same for an encoder-decoder model: prompts of several lengths, and responses that grow."""
    lm, prompts = model.lm, torch.tensor([WIDTH, 9, 3])
    rng = torch.Generator().manual_seed(1)
    ids, decoder_ids = (torch.randint(3, V, (len(prompts), WIDTH), generator=rng) for _ in range(2))
    own = torch.stack(
        [
            lm(
                input_ids=ids[row : row + 1, :size], decoder_input_ids=decoder_ids[row : row + 1], use_cache=False
            ).logits[0]
            for row, size in enumerate(prompts.tolist())
        ]
    )  # (N, W, V)
    decoder = CachedEncoderDecoder(lm, len(prompts), WIDTH, WIDTH)
    sizes = torch.tensor([1, 5, 2])
    differences = []
    for step in range(WIDTH + 10):
        rows = EncoderDecoderRows(ids, prompts, decoder_ids, sizes)
        differences.append(_off(model.head(decoder.advance(*rows)), own, sizes))
        if step % 7 == 0:
            differences.append(_off(model.head(EncoderDecoderStates.whole(rows).hidden(lm)), own, sizes))
        sizes = sizes + 1
        restarted = (sizes > WIDTH) | (torch.arange(len(prompts)) * 10 + 7 == step)
        sizes[restarted] = 1 + step % 4
    return max(differences)


def _own_logits(lm: Any, ids: Tensor) -> Tensor:
    """Return the logits `(N, W, V)` after every prefix of each row, each row alone and each prefix by itself."""
    prefixes = [
        [lm(input_ids=row[None, :size], use_cache=False).logits[0, -1] for size in range(1, len(row) + 1)]
        for row in ids
    ]
    return torch.stack([torch.stack(logits) for logits in prefixes])


def _off(logits: Tensor, own: Tensor, sizes: Tensor) -> float:
    """Return the largest difference of logits `(N, V)` from those after the first `sizes` `(N,)` tokens of each row."""
    expected = own[torch.arange(len(sizes)), sizes - 1]
    return float((logits - expected).abs().max() / own.std())
