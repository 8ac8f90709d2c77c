"""Contexts: what observations say, for causal and for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from textgym.models.attention import PackedStates, States, check_encoder_decoder
from textgym.models.decoding import CachedDecoder
from textgym.models.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates
from textgym.models.encoder_decoder_cache import CachedEncoderDecoder

PARTS = ("", "decoder_")
"""What the names of ids and masks begin with, the prompt or whole context first."""


@dataclass(frozen=True)
class Contexts:
    """B contexts on a device.

    Attributes:
        tensors: ids `(B, W)` and lengths `(B,)` of the contexts; for encoder-decoder models those of the prompts, then
            those of what the decoder has so far. They are the arguments of the cached decoder's `advance`.
    """

    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, W)`, or `(B, P, D)`: what a cached decoder is made for."""
        return len(self.tensors[0]), *(ids.shape[1] for ids in self.tensors[::2])

    def states(self) -> States:
        """The same to be passed whole."""
        if len(self.tensors) == 2:
            return PackedStates.whole(*self.tensors)
        return EncoderDecoderStates.whole(EncoderDecoderRows(*self.tensors))


def read_contexts(observation: Mapping[str, Any], device: torch.device) -> tuple[Contexts, bool]:
    """The contexts of an observation, and whether they came as a batch."""
    tensors: list[Tensor] = []
    for part in PARTS:
        if f"{part}input_ids" in observation:
            tensors.append(torch.as_tensor(observation[f"{part}input_ids"], device=device))
            tensors.append(torch.as_tensor(observation[f"{part}attention_mask"], device=device).sum(-1))
    batched = tensors[0].ndim == 2
    return Contexts(tuple(tensors if batched else (x[None] for x in tensors))), batched


def cached_decoder(lm: Any, shape: tuple[int, ...]) -> CachedDecoder | CachedEncoderDecoder:
    """A decoder for contexts of a shape.

    Raises:
        ValueError: the contexts are not laid out for this kind of model.
    """
    check_encoder_decoder(lm, wanted=len(shape) == 3)
    return CachedEncoderDecoder(lm, *shape) if len(shape) == 3 else CachedDecoder(lm, *shape)
