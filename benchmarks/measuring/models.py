"""Random models of several sizes, made on the device: no network, no copy from the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from measuring.roofline import random_llama


class Size(NamedTuple):
    """Size of a random Llama."""

    hidden_size: int
    layers: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        """Number of weights; the tied embedding counts once, and there are four query heads per key head."""
        layer = self.hidden_size**2 * (2 + 2 / 4 + 3 * 4)
        return int(self.vocab_size * self.hidden_size + self.layers * layer)


BILLION = (Size(2048, 16, 128_000), Size(1024, 16, 64_000), Size(512, 8, 32_000))
"""About 1.2, 0.3 and 0.05 billion weights: the first is the standard, the others are for smaller GPUs."""
TOY = (Size(64, 2, 500),)


def fitting(sizes: tuple[Size, ...], device: torch.device, bytes_per_weight: float, spare: float = 0.0) -> Size | None:
    """Return the first size whose weights, at so many bytes each, fit with `spare` bytes into 90% of free memory."""
    if device.type != "cuda":
        return sizes[0]
    free, _ = torch.cuda.mem_get_info(device)
    return next((size for size in sizes if size.parameters * bytes_per_weight + spare < 0.9 * free), None)


def make_model(size: Size, context: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a random Llama with seed 0."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = random_llama(size.hidden_size, size.layers, size.vocab_size, context)
    return lm.to(dtype).eval()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the words w0, w1, ...; w1 is EOS and w2 the padding."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")


def word_prompts(rows: int, tokens: int, vocab_size: int) -> list[str]:
    """Return different prompts with this number of tokens each."""
    return [" ".join(f"w{3 + (row * tokens + i) % (vocab_size - 3)}" for i in range(tokens)) for row in range(rows)]


def save_model(size: Size, context: int, folder: Path, dtype: torch.dtype) -> None:
    """Write a random Llama and its tokenizer in transformers' format."""
    lm: Any = make_model(size, context, torch.device("cpu"), dtype)
    lm.config.eos_token_id, lm.config.pad_token_id, lm.config.bos_token_id = 1, 2, None
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = 1, 2
    lm.save_pretrained(folder)
    word_tokenizer(size.vocab_size).save_pretrained(folder)
