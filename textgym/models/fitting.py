"""Who fits whom: the tokenizer, vocabulary and stop tokens of models and environments that are used together."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.models.loading import load_tokenizer, place_and_time

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")


def tokenizer_of(lm: Any) -> Tokenizer | None:
    """Return the tokenizer saved beside the weights that a model was loaded from; `None` if there is none."""
    folder = Path(lm.name_or_path)
    if not lm.name_or_path or (folder.is_dir() and not any(list(folder.glob(name)) for name in TOKENIZER_FILES)):
        return None
    try:
        return load_tokenizer(lm.name_or_path)
    except (ValueError, OSError, ImportError):
        return None


def check_tokenizer(tokenizer: Tokenizer, lm: Any, vocab_size: int, model: str = "the policy") -> None:
    """Refuse a tokenizer that is not a model's: some of its tokens have no embedding, or belong to other ids.

    Padding of the model's vocabulary beyond the tokenizer's is right.

    Args:
        tokenizer: of the environment or the data.
        lm: the language model.
        vocab_size: V, the rows of its output embedding.
        model: what to call it.

    Raises:
        ValueError: they do not fit.
    """
    size = len(tokenizer)
    if size > vocab_size:
        missing = tokenizer.convert_ids_to_tokens(vocab_size)
        raise ValueError(
            f"{model} ({_named(lm)}) has {vocab_size} tokens, and the tokenizer ({_named(tokenizer)}) has {size}, so "
            f"{missing!r} (id {vocab_size}) has no embedding: use the model's own tokenizer, or resize the model first "
            "by lm.resize_token_embeddings(len(tokenizer))"
        )
    own = tokenizer_of(lm)
    if own is not None and (difference := _first_difference(own, tokenizer, len(own), size)) is not None:
        index, known, given = difference
        raise ValueError(
            f"{model} ({_named(lm)}) was saved with another tokenizer than the one given ({_named(tokenizer)}): id "
            f"{index} is {known!r} there and {given!r} here. Use the model's own tokenizer"
        )


def check_stop_ids(stop_ids: Iterable[int], vocab_size: int, model: str) -> None:
    """Refuse stop tokens that a model cannot generate.

    Raises:
        ValueError: an id outside the model's vocabulary.
    """
    outside = sorted(index for index in stop_ids if not 0 <= index < vocab_size)
    if outside:
        raise ValueError(
            f"stop tokens {outside} are outside the vocabulary of {model}, which has {vocab_size} tokens: mend its "
            "generation_config.eos_token_id, or use the model's own tokenizer"
        )


def check_same_size(policy: Any, reference: Any) -> None:
    """Refuse a reference that has another number of tokens than the policy, since a KL compares the same tokens.

    Args:
        policy: a `TokenModel`.
        reference: another one.

    Raises:
        ValueError: the sizes differ.
    """
    if policy.vocab_size != reference.vocab_size:
        raise ValueError(
            f"the policy ({_named(policy.lm)}) has {policy.vocab_size} tokens, and the reference "
            f"({_named(reference.lm)}) has {reference.vocab_size}: use a reference with the policy's vocabulary, or "
            "resize one of them by lm.resize_token_embeddings"
        )


def stop_ids(lm: Any) -> tuple[int, ...]:
    """Return the tokens that end a model's responses by its generation config; some models have several."""
    return _as_ids(getattr(getattr(lm, "generation_config", None), "eos_token_id", None))


def known_of_model(tokenizer: Tokenizer) -> tuple[int, tuple[int, ...]]:
    """Return what is known of the model that a tokenizer was saved with: its vocabulary size (0: unknown), stop ids."""
    return _known_by_name(*place_and_time(tokenizer.name_or_path)) if tokenizer.name_or_path else (0, ())


@lru_cache(maxsize=16)
def _known_by_name(name: str, time: int) -> tuple[int, tuple[int, ...]]:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ValueError, OSError, KeyError):  # a tokenizer by itself, or a model that transformers does not know
        return 0, ()
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size or 0, _as_ids(generation.eos_token_id)


def _as_ids(eos_token_id: int | list[int] | None) -> tuple[int, ...]:
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(int(index) for index in eos_token_id)


@lru_cache(maxsize=16)
def _first_difference(first: Tokenizer, second: Tokenizer, *sizes: int) -> tuple[int, str | None, str | None] | None:
    """Return the first id that names one token here and another one there; tokenizers may be given new tokens."""
    if first is second:
        return None
    tokens = {index: token for token, index in first.get_vocab().items()}
    others = sorted((index, token) for token, index in second.get_vocab().items())
    return next(
        ((index, tokens[index], token) for index, token in others if tokens.get(index, token) != token),
        None,
    )


def _named(thing: Any) -> str:
    """Return what to call a model or tokenizer in an error."""
    return thing.name_or_path or type(thing).__name__
