"""Contexts: what observations say, for causal and for encoder-decoder models."""

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
    """An observation that says on the host which contexts it shows, so that a decoder need not compare them.

    Where somebody has changed or replaced its tensors it is as any other observation.

    Args:
        tensors: the observation.
        episodes: `(B,)`, the number of each row's episode, which no other episode has.
        lengths: `(B,)`, the tokens of each context.
    """

    def __init__(self, tensors: dict[str, Tensor], episodes: np.ndarray, lengths: np.ndarray) -> None:
        super().__init__(tensors)
        self._contexts = NumberedContexts(episodes, lengths)
        self._as_made = {key: (tensor, _version(tensor)) for key, tensor in tensors.items()}

    @property
    def contexts(self) -> NumberedContexts | None:
        """Which contexts these are; `None` if somebody has changed them."""
        untouched = self.keys() == self._as_made.keys() and all(
            self[key] is tensor and version is not None and version == _version(tensor)
            for key, (tensor, version) in self._as_made.items()
        )
        return self._contexts if untouched else None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a plain observation: elsewhere numbers of episodes mean nothing."""
        return dict, (dict(self),)


@dataclass(frozen=True)
class CausalContexts:
    """B contexts of a causal model, on a device.

    Attributes:
        input_ids: `(B, W)`, right-padded.
        lengths: `(B,)`.
        host: what the host knows of them, if anything.
    """

    input_ids: Tensor
    lengths: Tensor
    host: HostContexts | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, W)`: what a cached decoder is made for."""
        return tuple(self.input_ids.shape)

    @property
    def known(self) -> tuple[Any, ...]:
        """The arguments of the cached decoder's `advance`."""
        return self.input_ids, self.lengths, self.host

    def states(self) -> States:
        """The same to be passed whole."""
        return PackedStates.whole(self.input_ids, self.lengths)

    def decoder(self, lm: Any) -> CachedDecoder:
        """Return a decoder for contexts of this shape.

        Raises:
            ValueError: the model is an encoder-decoder one.
        """
        check_encoder_decoder(lm, wanted=False)
        return CachedDecoder(lm, *self.input_ids.shape)


@dataclass(frozen=True)
class EncoderDecoderContexts:
    """B prompts of an encoder-decoder model, with what its decoder has so far, on a device."""

    rows: EncoderDecoderRows

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, P, D)`: what a cached decoder is made for."""
        return *self.rows.input_ids.shape, self.rows.decoder_input_ids.shape[1]

    @property
    def known(self) -> tuple[Any, ...]:
        """The arguments of the cached decoder's `advance`."""
        return self.rows

    def states(self) -> States:
        """The same to be passed whole."""
        return EncoderDecoderStates.whole(self.rows)

    def decoder(self, lm: Any) -> CachedEncoderDecoder:
        """Return a decoder for contexts of this shape.

        Raises:
            ValueError: the model is a causal one.
        """
        check_encoder_decoder(lm, wanted=True)
        num_rows, max_prompt_tokens = self.rows.input_ids.shape
        return CachedEncoderDecoder(lm, num_rows, max_prompt_tokens, self.rows.decoder_input_ids.shape[1])


Contexts = CausalContexts | EncoderDecoderContexts
"""What observations show."""


def read_contexts(observation: Mapping[str, Any], device: torch.device) -> tuple[Contexts, bool]:
    """The contexts of an observation, and whether they came as a batch.

    Raises:
        ValueError: the observation is not token ids padded on the right.
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
    if device.type != "cpu":  # on a CPU nobody waits for a comparison
        if isinstance(observation, Shown):
            host = observation.contexts
        elif rows[0].device.type == "cpu":
            host = PlainContexts(*(x.numpy().copy() for x in rows))
    input_ids, lengths = to_device(device, *rows)
    return CausalContexts(input_ids, lengths, host), batched


def _check_tokens(ids: Tensor, mask: Tensor, part: str) -> None:
    """Refuses what a wrapper or another library has made of token ids."""
    if ids.is_floating_point() or mask.is_floating_point():
        raise ValueError(
            f"{part}input_ids and {part}attention_mask must be whole numbers, got {ids.dtype} and {mask.dtype}: leave "
            "observations as the environment gives them, with SB3 by VecNormalize(env, norm_obs=False)"
        )
    if mask.device.type == "cpu" and bool((mask[..., 1:] > mask[..., :-1]).any()):  # elsewhere the host would wait
        raise ValueError(
            f"{part}input_ids must be padded on the right, but {part}attention_mask goes on after a 0: leave "
            "observations as the environment gives them, unstacked, and set tokenizer.padding_side='right'"
        )


def _version(tensor: Tensor) -> int | None:
    """Grows whenever a tensor is changed; `None` in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version
