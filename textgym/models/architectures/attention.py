"""Explicit attention masks and packed batches for stock transformers models.

A 4-D mask and position ids are handed to the model as they are, so one rule serves cached decoding, left-to-right
scoring, and several sequences laid side by side in one row.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from textgym.models.architectures.packing import plan
from textgym.models.machine.transfer import to_device, to_host

FULL, SLIDING = "full_attention", "sliding_attention"
MAX_PADDING = 0.1
"""Share of padding that is computed for the sake of larger batches."""


class States(Protocol):
    """M contexts: where a token is to be chosen, or was. `hidden` gives them all in few passes."""

    def __len__(self) -> int:
        """M."""

    def __getitem__(self, chosen: slice | Tensor) -> Self:
        """Some of them."""

    def hidden(self, lm: Any) -> Tensor:
        """Last hidden state `(M, d)` of each."""


class Packed(NamedTuple):
    """Sequences laid side by side in rows of equal length, so that hardly any padding is computed.

    Where that is cheaper, those with the same prompt share it: it is laid out once, and their responses follow it.

    Attributes:
        input_ids: `(R, L)`.
        position_ids: `(R, L)`, counting from 0 in each sequence.
        segments: `(R, L)`, the number of the sequence from 1, or beyond N of a prompt that is shared; 0 in the rest of
            a row.
        prompts: `(R, L)`, the segment that this one goes on from: a shared prompt, or itself.
        starts: `(N,)`, where each sequence starts in `input_ids.flatten()`.
        shared: `(N,)`, how many of its tokens it shares.
        resumes: `(N,)`, where it goes on after them.
        lengths: `(N,)`, its tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    prompts: Tensor
    starts: Tensor
    shared: Tensor
    resumes: Tensor
    lengths: Tensor

    def slots(self, rows: Tensor, places: Tensor) -> Tensor:
        """Where the tokens at `places` `(M,)` of sequences `rows` `(M,)` are in `input_ids.flatten()`."""
        shared = self.shared[rows]
        return torch.where(places < shared, self.starts[rows], self.resumes[rows] - shared) + places


@dataclass(frozen=True)
class PackedStates:
    """M states, each a prefix of one of several packed sequences, so that one pass over the sequences gives them all.

    Attributes:
        packed: the sequences.
        index: `(M,)`, where the last token of each state is in `packed.input_ids.flatten()`.
    """

    packed: Packed
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: slice | Tensor) -> PackedStates:
        """Some of the states."""
        return PackedStates(self.packed, self.index[chosen])

    @classmethod
    def prefixes(cls, input_ids: Tensor, lengths: Tensor, rows: Tensor, sizes: Tensor) -> PackedStates:
        """The first `sizes` `(M,)` tokens of `rows` `(M,)`; the other arguments are those of `pack`."""
        packed = pack(input_ids, lengths)
        return cls(packed, packed.slots(rows, sizes - 1))

    @classmethod
    def whole(cls, input_ids: Tensor, lengths: Tensor) -> PackedStates:
        """Every row of `input_ids` `(N, W)` to its full length `(N,)`: N states."""
        packed = pack(input_ids, lengths)
        rows = torch.arange(len(packed.lengths), device=input_ids.device)
        return cls(packed, packed.slots(rows, packed.lengths - 1))

    def hidden(self, lm: Any) -> Tensor:
        """Last hidden state `(M, d)` of each state.

        Raises:
            ValueError: `lm` is an encoder-decoder model.
        """
        check_encoder_decoder(lm, wanted=False)
        return packed_hidden(lm, self.packed)[self.index]


def pack(
    input_ids: Tensor,
    lengths: Tensor | np.ndarray,
    prompt_lengths: Tensor | np.ndarray | None = None,
    sharing: Sequence[Sequence[int]] | None = None,
) -> Packed:
    """Packs right-padded rows. Lengths are read on the host, so they had better be there already.

    Args:
        input_ids: `(N, W)`, right-padded.
        lengths: `(N,)`, real tokens of each row, at least 1.
        prompt_lengths: `(N,)`, how many of them are a prompt, which others may share; `None`: nobody shares.
        sharing: the rows of each prompt, where they are known, see `rows_alike`.
    """
    sizes, device = lengths.tolist(), input_ids.device
    if prompt_lengths is None:
        planned = plan(sizes, [0] * len(sizes), [[row] for row in range(len(sizes))])
    else:
        sharing = sharing or rows_alike(input_ids, torch.as_tensor(prompt_lengths))
        planned = plan(sizes, prompt_lengths.tolist(), sharing)
    [columns] = to_device(device, torch.tensor([sizes, *planned[:4]]))
    there, starts, shared, resumes, bundles = columns
    row, place = ragged(there, sum(sizes))
    in_prompt, prompt = place < shared[row], bundles[row] + len(sizes) + 1
    slot = torch.where(in_prompt, starts[row], resumes[row] - shared[row]) + place
    flat = torch.zeros(4, planned.rows * planned.width, dtype=torch.long, device=device)
    flat[0, slot] = input_ids[row, place]  # a shared prompt is written by each that shares it
    flat[1, slot] = place
    flat[2, slot] = torch.where(in_prompt, prompt, row + 1)
    flat[3, slot] = torch.where(shared[row] > 0, prompt, row + 1)
    ids, positions, segments, prompts = flat.view(4, planned.rows, planned.width)
    return Packed(ids, positions, segments, prompts, starts, shared, resumes, there)


def rows_alike(input_ids: Tensor, lengths: Tensor) -> list[list[int]]:
    """Indices of rows whose first tokens are the same: as many as `lengths` `(N,)` says of `input_ids` `(N, W)`.

    >>> rows_alike(torch.tensor([[5, 6, 9], [5, 7, 0], [5, 6, 8]]), torch.tensor([2, 2, 2]))
    [[0, 2], [1]]
    """
    ids, sizes = to_host(input_ids, lengths)
    return alike(first_tokens(ids, sizes))


def first_tokens(input_ids: Tensor, lengths: Tensor) -> list[bytes]:
    """The first tokens of each row, as many as `lengths` `(N,)` says, in a form to compare; both are on the host."""
    return [row[:length].tobytes() for row, length in zip(input_ids.numpy(), lengths.tolist(), strict=True)]


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """Indices of equal keys, in the order in which they first occur."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return list(found.values())


def batches_by_length(lengths: Sequence[int], batch_size: int, max_padding: float = MAX_PADDING) -> list[list[int]]:
    """Indices of rows in batches of similar length: of its slots at most the share `max_padding` is padding.

    >>> batches_by_length([1, 10, 11, 1], batch_size=64)
    [[0, 3], [1, 2]]
    """
    batches: list[list[int]] = []
    tokens = 0  # real ones in the batch under way
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        width, size = lengths[index], len(batches[-1]) + 1 if batches else 0
        if not batches or size > batch_size or tokens + width < (1 - max_padding) * size * width:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += width
    return batches


def ragged(lengths: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every real slot of rows with these lengths, row by row: two `(sum(lengths),)` tensors.

    The host waits for the sum of the lengths, unless it is given.
    """
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    first = (lengths.cumsum(0) - lengths)[rows]
    return rows, torch.arange(len(rows), device=lengths.device) - first


def packed_hidden(lm: Any, packed: Packed) -> Tensor:
    """Last hidden states `(R * L, d)` of the packed sequences, each attending to itself and its prompt alone."""
    rows, width = packed.input_ids.shape
    if rows == len(packed.starts):  # one in each: no real token sees what follows it, and kernels need no mask for that
        mask, positions = None, torch.arange(width, device=packed.input_ids.device).expand(rows, -1)
    else:
        mask, positions = attention_mask(lm, *_own_past(packed)), packed.position_ids
    with recomputing(lm.base_model):
        output = lm.base_model(input_ids=packed.input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def _own_past(packed: Packed) -> tuple[Tensor, Tensor]:
    """Which slots each slot may see, bool `(R, 1, L, L)`, and how many positions away they are."""
    seen = packed.segments[:, None, :]
    own = (packed.segments[:, :, None] == seen) | (packed.prompts[:, :, None] == seen)  # (R, L, L)
    order = torch.arange(own.shape[1], device=own.device)
    allowed = (own & (order[:, None] >= order))[:, None]
    return allowed, packed.position_ids[:, None, :, None] - packed.position_ids[:, None, None, :]


def checkpoint_layers(trunk: Any) -> None:
    """From now on packed passes with gradients keep what goes into each layer alone, and run it again going backward.

    Raises:
        ValueError: transformers does not know how to for this model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions call it activation checkpointing
        trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trunk.eval()
    if not checkpointing_layers(trunk):
        raise ValueError(
            f"no layer of {type(trunk).__name__} can be computed again in the backward pass: leave checkpointing off"
        )


def checkpointing_layers(trunk: Any) -> list[Any]:
    """Return the layers that store only their inputs in training, and compute the rest again for the gradient."""
    layers = [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if layer.gradient_checkpointing]


@contextlib.contextmanager
def recomputing(trunk: Any) -> Iterator[None]:
    """Layers checkpoint in training mode alone, and drop the cache in it; so they leave it again for decoding.

    What is inside of a layer does not enter it: it would not be in it when the backward pass runs the layer again.
    """
    layers = checkpointing_layers(trunk) if torch.is_grad_enabled() else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def attention_mask(lm: Any, allowed: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
    """The additive mask that a model takes as prepared: one tensor, or one for each kind of attention layer it has.

    Args:
        allowed: bool `(B, 1, Q, K)`, which keys a query may see whatever the layer.
        distance: `(B, 1, Q, K)`, position of the query minus position of the key, for sliding windows.
    """
    config = lm.config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:  # one kind of layer throughout, windowed where the model has a window
        return additive_mask(allowed if window is None else allowed & (distance < window), lm.dtype)
    seen = {FULL: allowed, SLIDING: allowed if window is None else allowed & (distance < window)}
    return {kind: additive_mask(seen[kind], lm.dtype) for kind in kinds}


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key may be seen and the lowest float elsewhere, in the shape of `allowed`."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def check_encoder_decoder(lm: Any, *, wanted: bool) -> None:
    """Refuses a model of the other kind than the observations or sequences are laid out for.

    Raises:
        ValueError: what to do about it.
    """
    if bool(lm.config.is_encoder_decoder) == wanted:
        return
    name = type(lm).__name__
    if wanted:
        raise ValueError(
            f"{name} has no encoder, and the environment is made for an encoder-decoder model: make it without "
            "decoder_start_ids"
        )
    raise ValueError(
        f"{name} is an encoder-decoder model: make the environment with the token ids that its decoder begins with, "
        "decoder_start_ids=policy.decoder_start_ids"
    )
