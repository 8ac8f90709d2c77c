"""Models that meet in an environment: their vocabulary, and whether they can read its longest text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textgym.models.architectures.attention import check_encoder_decoder
from textgym.models.architectures.positions import check_positions
from textgym.models.architectures.support import check_supported
from textgym.models.fitting import check_stop_ids, check_tokenizer, known_of_model, stop_ids
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import KLPenalty


def known_vocabulary(tokenizer: Any, penalty: KLPenalty | None) -> tuple[int, tuple[int, ...]]:
    """Return V and the stop tokens of the model, from the reference or from the model in the tokenizer's folder.

    Raises:
        ValueError: If the reference does not fit the tokenizer.
    """
    size, ids = known_of_model(tokenizer)
    size = max(size, len(tokenizer))
    if penalty is not None:
        reference = penalty.reference
        check_tokenizer(tokenizer, reference.lm, reference.vocab_size, "the reference")
        size = reference.vocab_size
        ids = (*ids, *stop_ids(reference.lm))
    check_stop_ids(ids, size, "the model")
    return size, ids


def check_lengths(model: TokenModel, name: str, prompt: int, response: int, decoder_start: int) -> None:
    """Check that a model supports the longest text of an episode exactly; arguments as `check_enough_positions`."""
    longest = check_enough_positions(model.lm.config, name, prompt, response, decoder_start)
    check_supported(model.lm, model.head, longest)


def check_enough_positions(config: Any, name: str, prompt: int, response: int, decoder_start: int) -> int:
    """Check that a model has enough positions, and return the number that an episode may need.

    Args:
        config: The model's config.
        name: Its name in the error.
        prompt: The most tokens of a prompt.
        response: The most tokens of a response.
        decoder_start: The number of tokens that the decoder of an encoder-decoder model begins with, otherwise 0.

    Raises:
        ValueError: If it has too few.
    """
    if decoder_start:
        texts = {"a prompt": prompt, "a response": decoder_start + response}
    else:
        texts = {"a prompt with its response": prompt + response}
    for text, tokens in texts.items():
        check_positions(config, tokens, f"{text} for {name}")
    return max(texts.values())


def checked_decoder_start(given: Sequence[int], vocab_size: int, penalty: KLPenalty | None) -> tuple[int, ...]:
    """Return the decoder's start tokens, after a check that the reference is of the same kind of model."""
    start = tuple(int(token) for token in given)
    if any(not 0 <= token < vocab_size for token in start):
        raise ValueError(f"decoder_start_ids must be token ids from 0 to {vocab_size - 1}, got {list(start)}")
    if penalty is not None:
        check_encoder_decoder(penalty.reference.lm, wanted=bool(start))
    return start
