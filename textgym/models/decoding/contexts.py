"""Contexts: observations as tensors on a device, for causal and for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textgym.models.architectures.attention import PackedStates, States, check_encoder_decoder
from textgym.models.architectures.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates
from textgym.models.decoding.cached_decoder import CachedDecoder, HostContexts, NumberedContexts, PlainContexts
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder
from textgym.models.machine.devices import check_fork
from textgym.models.machine.transfer import to_device


class Shown(dict[str, Tensor]):
    """An observation with episode numbers in host memory, so that a decoder need not compare contexts on the device.

    If its tensors were changed or replaced, for example by a wrapper, it is used like any other observation.

    Args:
        tensors: The observation.
        episodes: `(B,)`, a unique number for the episode of each row.
        lengths: `(B,)`, number of tokens of each context.
    """

    def __init__(self, tensors: dict[str, Tensor], episodes: np.ndarray, lengths: np.ndarray) -> None:
        super().__init__(tensors)
        self._contexts = NumberedContexts(episodes, lengths)
        self._original = {key: (tensor, _version(tensor)) for key, tensor in tensors.items()}

    @property
    def contexts(self) -> NumberedContexts | None:
        """The episode numbers and lengths; `None` if the tensors were changed or replaced."""
        unchanged = self.keys() == self._original.keys() and all(
            self[key] is tensor and version is not None and version == _version(tensor)
            for key, (tensor, version) in self._original.items()
        )
        return self._contexts if unchanged else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a plain dict, because episode numbers are unique only within this process."""
        return dict, (dict(self),)


@dataclass(frozen=True)
class CausalContexts:
    """B contexts of a causal model, on a device.

    Attributes:
        input_ids: `(B, W)`, right-padded.
        lengths: `(B,)`, number of tokens of each context.
        host: The same contexts as the host knows them, if it does.
    """

    input_ids: Tensor
    lengths: Tensor
    host: HostContexts | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, W)`, the shape of a cached decoder for them."""
        return tuple(self.input_ids.shape)

    @property
    def known(self) -> tuple[Any, ...]:
        """The arguments of the cached decoder's `advance`."""
        return self.input_ids, self.lengths, self.host

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """The tokens before the next one, right-padded `(B, W)`, and their numbers `(B,)`."""
        return self.input_ids, self.lengths

    def states(self) -> States:
        """Return the contexts for one full forward pass."""
        return PackedStates.whole(self.input_ids, self.lengths)

    def decoder(self, lm: Any) -> CachedDecoder:
        """Return a decoder for contexts of this shape.

        Raises:
            ValueError: If the model is an encoder-decoder model.
        """
        check_encoder_decoder(lm, wanted=False)
        return CachedDecoder(lm, *self.input_ids.shape)


@dataclass(frozen=True)
class EncoderDecoderContexts:
    """B prompts of an encoder-decoder model with the decoder's tokens so far, on a device."""

    rows: EncoderDecoderRows

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, P, D)`, the shape of a cached decoder for them."""
        return *self.rows.input_ids.shape, self.rows.decoder_input_ids.shape[1]

    @property
    def known(self) -> tuple[Any, ...]:
        """The arguments of the cached decoder's `advance`."""
        return self.rows

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """The decoder's tokens before the next one, right-padded `(B, D)`, and their numbers `(B,)`."""
        return self.rows.decoder_input_ids, self.rows.decoder_lengths

    def states(self) -> States:
        """Return the contexts for one full forward pass."""
        return EncoderDecoderStates.whole(self.rows)

    def decoder(self, lm: Any) -> CachedEncoderDecoder:
        """Return a decoder for contexts of this shape.

        Raises:
            ValueError: If the model is a causal model.
        """
        check_encoder_decoder(lm, wanted=True)
        num_rows, max_prompt_tokens = self.rows.input_ids.shape
        return CachedEncoderDecoder(lm, num_rows, max_prompt_tokens, self.rows.decoder_input_ids.shape[1])


Contexts = CausalContexts | EncoderDecoderContexts
"""Contexts of an observation."""


def read_contexts(observation: Mapping[str, Any], device: torch.device) -> tuple[Contexts, bool]:
    """Return the contexts of an observation, and whether the observation is a batch.

    Raises:
        ValueError: If the observation is not token ids padded on the right.
    """
    check_fork(device.type)
    encoder_decoder = "decoder_input_ids" in observation
    given: list[Tensor] = []
    for part in ("", "decoder_") if encoder_decoder else ("",):
        ids, mask = (torch.as_tensor(observation[f"{part}{name}"]) for name in ("input_ids", "attention_mask"))
        if not isinstance(observation, Shown):
            _check_tokens(ids, mask, part)
        given += [ids, mask.sum(-1)]
    batched = given[0].ndim == 2
    rows = given if batched else [x[None] for x in given]
    if encoder_decoder:
        return EncoderDecoderContexts(EncoderDecoderRows(*to_device(device, *rows))), batched

    host: HostContexts | None = None
    if device.type != "cpu":  # on a CPU a comparison of contexts does not make the host wait
        if isinstance(observation, Shown):
            host = observation.contexts
        elif rows[0].device.type == "cpu":
            host = PlainContexts(*(x.numpy().copy() for x in rows))
    input_ids, lengths = to_device(device, *rows)
    return CausalContexts(input_ids, lengths, host), batched


def _check_tokens(ids: Tensor, mask: Tensor, part: str) -> None:
    """Raise an error if a wrapper or another library has scaled, stacked or left-padded token ids."""
    if ids.is_floating_point() or mask.is_floating_point():
        raise ValueError(
            f"{part}input_ids and {part}attention_mask must be whole numbers, got {ids.dtype} and {mask.dtype}: leave "
            "observations as the environment gives them, with SB3 by VecNormalize(env, norm_obs=False)"
        )
    # Only on a CPU: on a GPU the host would have to wait for the result in every step.
    if mask.device.type == "cpu" and bool((mask[..., 1:] > mask[..., :-1]).any()):
        raise ValueError(
            f"{part}input_ids must be padded on the right, but {part}attention_mask has a 1 after a 0: leave "
            "observations as the environment gives them, unstacked, and set tokenizer.padding_side='right'"
        )


def _version(tensor: Tensor) -> int | None:
    """Return a number that increases when a tensor changes in place; `None` for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version
