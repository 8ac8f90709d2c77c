"""Sequences: prompts with their responses, for scoring and training on whole episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from textgym.models.architectures.attention import PackedStates, States, alike, first_tokens, pack, ragged
from textgym.models.architectures.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates, split_rows
from textgym.models.distributions.log_probs import StopRule
from textgym.models.machine.transfer import to_device, to_host


class HostRows(NamedTuple):
    """Prompts and lengths of N sequences in host memory, so that packing need not wait for the device.

    Attributes:
        prompts: `(N,)` bytes objects, the ids of each prompt.
        prompt_lengths: `(N,)` int64.
        response_lengths: `(N,)` int64.
        num_tokens: `(N,)` int64, number of response tokens that the policy generated.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    num_tokens: np.ndarray

    @classmethod
    def read(cls, sequences: Sequences) -> HostRows:
        """Copy them from the device, in one transfer."""
        lengths = sequences.response_lengths
        generated = sequences.generated
        counts = lengths if generated is None else _real(lengths, generated, generated.shape[1]).sum(1)
        ids, prompt_lengths, lengths, counts = to_host(sequences.input_ids, sequences.prompt_lengths, lengths, counts)
        prompts = np.array([*first_tokens(ids, prompt_lengths), None], dtype=object)[:-1]
        return cls(prompts, prompt_lengths.numpy(), lengths.numpy(), counts.numpy())

    def take(self, rows: slice | np.ndarray) -> HostRows:
        """Return some of the rows."""
        return HostRows(*(column[rows] for column in self))


@dataclass(frozen=True)
class Sequences:
    """N prompts with their responses.

    Masks are computed from lengths and not from token ids, because the policy may generate the padding id. Derived
    tensors are computed on first use and then cached.

    Attributes:
        input_ids: `(N, W)` int64, right-padded: prompt, then response.
        prompt_lengths: `(N,)`, at least 1.
        response_lengths: `(N,)`, at least 1.
        stop: Stop tokens and the minimum length of a response.
        generated: Bool `(N, T)` or wider, the response tokens that the policy generated; `None` if it generated all.
            Tokens that an environment inserted, such as replies of a game, are context: no loss, no KL, no value.
        decoder_start: For encoder-decoder models, the token ids of the decoder before the response.
        known: Prompts and lengths on the host; `None` copies them from the device when they are needed.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    stop: StopRule = field(default_factory=StopRule)
    generated: Tensor | None = None
    decoder_start: tuple[int, ...] = ()
    known: HostRows | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Sequences:
        """Return some of the rows; with indices on a GPU the host waits for a copy of them."""
        return self.take(*on_both(rows, self.input_ids.device))

    def take(self, rows: slice | Tensor, host_rows: slice | np.ndarray) -> Sequences:
        """Return some of the rows, given by the same indices on the device and on the host."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            prompt_lengths=self.prompt_lengths[rows],
            response_lengths=self.response_lengths[rows],
            generated=None if self.generated is None else self.generated[rows],
            known=self.host.take(host_rows),
        )

    def to(self, device: torch.device) -> Sequences:
        """Return the sequences on a device."""
        if device == self.input_ids.device:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            prompt_lengths=self.prompt_lengths.to(device),
            response_lengths=self.response_lengths.to(device),
            generated=None if self.generated is None else self.generated.to(device),
            known=self.host,
        )

    @classmethod
    def cat(cls, parts: Sequence[Sequences]) -> Sequences:
        """Concatenate sequences of equal width W."""
        generated = None
        if any(part.generated is not None for part in parts):
            width = max(part.response_mask.shape[1] for part in parts)
            generated = torch.cat(
                [F.pad(part.response_mask, (0, width - part.response_mask.shape[1])) for part in parts]
            )
        return replace(
            parts[0],
            input_ids=torch.cat([part.input_ids for part in parts]),
            prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
            response_lengths=torch.cat([part.response_lengths for part in parts]),
            generated=generated,
            known=HostRows(*(np.concatenate(columns) for columns in zip(*(part.host for part in parts), strict=True))),
        )

    @cached_property
    def host(self) -> HostRows:
        """Prompts and lengths on the host."""
        return HostRows.read(self) if self.known is None else self.known

    @property
    def longest(self) -> int:
        """T, the length of the longest response."""
        return int(self.host.response_lengths.max())

    @property
    def num_tokens(self) -> int:
        """M, the number of tokens that the policy generated."""
        return int(self.host.num_tokens.sum())

    @cached_property
    def response_mask(self) -> Tensor:
        """Bool `(N, T)`: the tokens that the policy generated, without padding."""
        return _real(self.response_lengths, self.generated, self.longest)

    @cached_property
    def steps(self) -> tuple[Tensor, Tensor]:
        """Row, and index in the response, of each token that the policy generated, `(M,)` each."""
        if self.generated is None:
            return ragged(self.response_lengths, self.num_tokens)
        rows, steps = self.response_mask.nonzero(as_tuple=True)
        return rows, steps

    @property
    def lengths(self) -> Tensor:
        """`(N,)`, number of tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def actions(self) -> Tensor:
        """`(M,)`, the tokens that the policy generated in all rows, row by row; `pad` makes them `(N, T)`."""
        rows, steps = self.steps
        return self.input_ids[rows, self.prompt_lengths[rows] + steps]

    @property
    def banned(self) -> Tensor | None:
        """Bool `(M,)`: whether stop ids were banned at each generated token; `None` if they never were."""
        return self.stop.applies(self.steps[1])

    def pad(self, flat: Tensor) -> Tensor:
        """Return values of generated tokens `(M,)` as `(N, T)`, zero elsewhere."""
        # Not masked_scatter: in its backward pass the host waits for the number of True entries in the mask.
        return flat.new_zeros(len(self), self.longest).index_put(self.steps, flat)

    def states(self) -> States:
        """Return the state before each generated token.

        The state before token t ends with token t - 1, so the last token of a row is in no state.
        """
        return self._states

    @cached_property
    def _states(self) -> States:
        rows, steps = self.steps
        if self.decoder_start:
            split = self.split(self.response_lengths - 1)
            return EncoderDecoderStates(split, rows, len(self.decoder_start) + steps - 1)
        host = self.host
        lengths = host.prompt_lengths + host.response_lengths - 1
        packed = pack(self.input_ids, lengths, host.prompt_lengths, alike(host.prompts))
        return PackedStates(packed, packed.slots(rows, self.prompt_lengths[rows] + steps - 1))

    def split(self, response_lengths: Tensor) -> EncoderDecoderRows:
        """Return the inputs of encoder and decoder, with each response cut to a length `(N,)`.

        The widths are those of the longest prompt and response, whatever the lengths are.
        """
        longest = int(self.host.prompt_lengths.max()), self.longest
        return split_rows(self.input_ids, self.prompt_lengths, response_lengths, self.decoder_start, *longest)

    def observation(self, response_lengths: Tensor) -> dict[str, Tensor]:
        """Return the observation of an environment when the responses had these lengths `(N,)`.

        Ids where the attention mask is 0 are arbitrary.
        """
        if self.decoder_start:
            return self.split(response_lengths).observation()
        slots = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        lengths = self.prompt_lengths + response_lengths
        return {"input_ids": self.input_ids, "attention_mask": (slots < lengths[:, None]).long()}


def on_both(rows: slice | Tensor, device: torch.device) -> tuple[Any, Any]:
    """Return indices of rows on a device, and on the host as a NumPy array; a slice is returned twice."""
    if isinstance(rows, slice):
        return rows, rows
    [device_rows], [host_rows] = to_device(device, rows), to_host(rows)
    return device_rows, host_rows.numpy()


def _real(lengths: Tensor, generated: Tensor | None, width: int) -> Tensor:
    """Return bool `(N, width)`: tokens that are not padding and, if `generated` is given, that the policy generated."""
    real = torch.arange(width, device=lengths.device) < lengths[:, None]
    return real if generated is None else real & generated[:, :width]
