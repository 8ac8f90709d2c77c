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

PARTS = ("", "decoder_")
"""What the names of ids and masks begin with, the prompt or whole context first."""


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
class Contexts:
    """B contexts on a device.

    Attributes:
        tensors: ids `(B, W)` and lengths `(B,)` of the contexts; for encoder-decoder models those of the prompts, then
            those of what the decoder has so far. They are the arguments of the cached decoder's `advance`.
        host: what the host knows of them, if anything.
    """

    tensors: tuple[Tensor, ...]
    host: HostContexts | None = None

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
    check_fork(device.type)
    given: list[Tensor] = []
    for part in PARTS:
        if f"{part}input_ids" in observation:
            given.append(torch.as_tensor(observation[f"{part}input_ids"]))
            given.append(torch.as_tensor(observation[f"{part}attention_mask"]).sum(-1))
    batched = given[0].ndim == 2
    rows = given if batched else [x[None] for x in given]
    host: HostContexts | None = None
    if device.type != "cpu" and len(rows) == 2:  # on a CPU nobody waits for a comparison
        if isinstance(observation, Shown):
            host = observation.contexts
        elif rows[0].device.type == "cpu":
            host = PlainContexts(*(x.numpy().copy() for x in rows))
    return Contexts(tuple(to_device(device, *rows)), host), batched


def cached_decoder(lm: Any, shape: tuple[int, ...]) -> CachedDecoder | CachedEncoderDecoder:
    """A decoder for contexts of a shape.

    Raises:
        ValueError: the contexts are not laid out for this kind of model.
    """
    check_encoder_decoder(lm, wanted=len(shape) == 3)
    return CachedEncoderDecoder(lm, *shape) if len(shape) == 3 else CachedDecoder(lm, *shape)


def _version(tensor: Tensor) -> int | None:
    """Grows whenever a tensor is changed; `None` in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version
