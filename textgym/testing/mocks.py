"""A byte tokenizer and tiny random language models, made in memory without downloads or files."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids 0 to 255 are the bytes of the UTF-8 text, with `<eos>` (256) and `<pad>` (257).

    >>> byte_tokenizer()("hé")["input_ids"]
    [104, 195, 169]
    >>> byte_tokenizer().decode([104, 195, 169])
    'hé'
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def mock_lm(
    vocab_size: int = 258,
    hidden_size: int = 32,
    num_layers: int = 2,
    architecture: str = "llama",
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Return a tiny random causal LM in evaluation mode; the last two ids of its vocabulary are EOS and padding.

    Args:
        vocab_size: Size of the vocabulary.
        hidden_size: Width of the model.
        num_layers: Number of layers.
        architecture: A `model_type` of transformers, such as `"llama"` (rotary positions) or `"gpt2"` (absolute ones).
        seed: Seed of the weights; the global generator is not used.
        config: Other fields of the model's config, such as `attention_dropout=0.1`.
    """
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": vocab_size - 2,
        "pad_token_id": vocab_size - 1,
        "initializer_range": 0.2,  # ten times the usual, so that the logits of so narrow a model differ visibly
    }
    if architecture != "gpt2":
        settings |= {"intermediate_size": 2 * hidden_size, "num_key_value_heads": 2, "head_dim": hidden_size // 2}
    shape = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_layers}
    return _random(AutoModelForCausalLM, architecture, seed, {**shape, **settings, **config})


def mock_seq2seq_lm(
    vocab_size: int = 258,
    hidden_size: int = 32,
    num_layers: int = 2,
    architecture: str = "t5",
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Return a tiny random encoder-decoder LM in evaluation mode.

    The last two ids of its vocabulary are EOS and padding. Its decoder starts with the padding token, as T5's does.

    Args:
        vocab_size: Size of the vocabulary.
        hidden_size: Width of the model.
        num_layers: Number of layers of encoder and decoder.
        architecture: `"t5"` or a similar model with relative positions, or a `model_type` like `"bart"` with absolute
            ones.
        seed: Seed of the weights; the global generator is not used.
        config: Other fields of the model's config.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": hidden_size,
        "bos_token_id": None,
        "eos_token_id": vocab_size - 2,
        "pad_token_id": vocab_size - 1,
        "decoder_start_token_id": vocab_size - 1,
    }
    if architecture.endswith("t5"):
        settings |= {"num_layers": num_layers, "num_heads": 2, "d_kv": hidden_size // 2, "d_ff": 2 * hidden_size}
    else:
        settings |= {"max_position_embeddings": 128, "init_std": 0.2, "forced_eos_token_id": None}
        for half in ("encoder", "decoder"):
            settings |= {
                f"{half}_layers": num_layers,
                f"{half}_attention_heads": 2,
                f"{half}_ffn_dim": 2 * hidden_size,
            }
    return _random(AutoModelForSeq2SeqLM, architecture, seed, {**settings, **config})


def _random(auto_class: Any, architecture: str, seed: int, settings: dict[str, Any]) -> PreTrainedModel:
    model_config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(model_config).eval()
    return model


def _byte_level_alphabet() -> list[str]:
    """Return the printable character that byte-level tokenizers use for each of the 256 bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(256)]
