"""A tokenizer of so few tokens that all texts can be listed."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def letter_tokenizer(vocab_size: int = 12) -> PreTrainedTokenizerFast:
    """A tokenizer of so few tokens that all texts can be listed: letters from `a`, then `<eos>` and `<pad>`.

    >>> letter_tokenizer(12)("cab")["input_ids"]
    [2, 0, 1]
    """
    if not 3 <= vocab_size <= 28:
        raise ValueError(f"vocab_size must be from 3 to 28 (letters, <eos>, <pad>), got {vocab_size}")
    letters = [chr(ord("a") + index) for index in range(vocab_size - 2)]
    vocabulary = {token: index for index, token in enumerate([*letters, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
