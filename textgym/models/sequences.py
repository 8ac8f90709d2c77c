"""Sequences: prompts with their responses, the form in which whole episodes are scored and trained on."""

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
    """What the host knows of N sequences: enough to lay them out without asking the device.

    Attributes:
        prompts: `(N,)` bytes objects, the ids of each prompt.
        prompt_lengths: `(N,)` int64.
        response_lengths: `(N,)` int64.
        num_tokens: `(N,)` int64, the response tokens that the policy wrote.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    num_tokens: np.ndarray

    @classmethod
    def read(cls, sequences: Sequences) -> HostRows:
        """By one copy from the device."""
        lengths = sequences.response_lengths
        generated = sequences.generated
        counts = lengths if generated is None else _real(lengths, generated, generated.shape[1]).sum(1)
        ids, prompt_lengths, lengths, counts = to_host(sequences.input_ids, sequences.prompt_lengths, lengths, counts)
        prompts = np.array([*first_tokens(ids, prompt_lengths), None], dtype=object)[:-1]
        return cls(prompts, prompt_lengths.numpy(), lengths.numpy(), counts.numpy())

    def take(self, rows: slice | np.ndarray) -> HostRows:
        """Some of the rows."""
        return HostRows(*(column[rows] for column in self))


@dataclass(frozen=True)
class Sequences:
    """N prompts with their responses. Masks come from lengths, never from token ids.

    What follows from these tensors is computed when it is first asked for, and kept.

    Attributes:
        input_ids: `(N, W)` int64, right-padded: prompt, then response.
        prompt_lengths: `(N,)`, at least 1.
        response_lengths: `(N,)`, at least 1.
        stop: which tokens end a response and how early they may, see `StopRule`.
        generated: bool `(N, T)` or wider, the response tokens that the policy wrote; `None` where it wrote all. What an
            environment put in between, such as the replies of a game, is context: no loss, no KL, no value.
        decoder_start: for encoder-decoder models, the token ids that the decoder begins with, before the response.
        known: what the host knows of the rows already; `None` reads it from the device when it is needed.
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
        """Some of the rows; indices had better be on the host."""
        return self.take(*on_both(rows, self.input_ids.device))

    def take(self, rows: slice | Tensor, host_rows: slice | np.ndarray) -> Sequences:
        """Some of the rows, whose indices are on the device and on the host."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            prompt_lengths=self.prompt_lengths[rows],
            response_lengths=self.response_lengths[rows],
            generated=None if self.generated is None else self.generated[rows],
            known=self.host.take(host_rows),
        )

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
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
        """The rows of several, which are equally wide."""
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
        """What the host knows of the rows."""
        return HostRows.read(self) if self.known is None else self.known

    @property
    def longest(self) -> int:
        """T, the tokens of the longest response."""
        return int(self.host.response_lengths.max())

    @property
    def num_tokens(self) -> int:
        """M, the tokens that the policy wrote."""
        return int(self.host.num_tokens.sum())

    @cached_property
    def response_mask(self) -> Tensor:
        """Bool `(N, T)`, T the longest response: the real response tokens that the policy wrote."""
        return _real(self.response_lengths, self.generated, self.longest)

    @cached_property
    def steps(self) -> tuple[Tensor, Tensor]:
        """Row and place in the response of each token that the policy wrote, `(M,)` each."""
        if self.generated is None:
            return ragged(self.response_lengths, self.num_tokens)
        rows, steps = self.response_mask.nonzero(as_tuple=True)
        return rows, steps

    @property
    def lengths(self) -> Tensor:
        """`(N,)`, prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def actions(self) -> Tensor:
        """`(M,)`, what the policy wrote in all rows, row by row; `pad` is the way back to `(N, T)`."""
        rows, steps = self.steps
        return self.input_ids[rows, self.prompt_lengths[rows] + steps]

    @property
    def banned(self) -> Tensor | None:
        """Bool `(M,)`: at which response tokens the stop ids were not allowed; `None` if at none."""
        return self.stop.applies(self.steps[1])

    def pad(self, flat: Tensor) -> Tensor:
        """Lays a value for each response token `(M,)` out as `(N, T)`, zero in the padding."""
        # Not masked_scatter, whose backward pass asks the device how many entries of a mask are set.
        return flat.new_zeros(len(self), self.longest).index_put(self.steps, flat)

    def states(self) -> States:
        """The states before each response token. The last token is left out: nothing is predicted from it."""
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
        """The rows as encoder and decoder read them, each response up to a length `(N,)`; as wide for any of these."""
        longest = int(self.host.prompt_lengths.max()), self.longest
        return split_rows(self.input_ids, self.prompt_lengths, response_lengths, self.decoder_start, *longest)

    def observation(self, response_lengths: Tensor) -> dict[str, Tensor]:
        """What an environment showed when the responses had these lengths `(N,)`.

        What stands beyond the masks means nothing.
        """
        if self.decoder_start:
            return self.split(response_lengths).observation()
        slots = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        lengths = self.prompt_lengths + response_lengths
        return {"input_ids": self.input_ids, "attention_mask": (slots < lengths[:, None]).long()}


def on_both(rows: slice | Tensor, device: torch.device) -> tuple[Any, Any]:
    """Indices of rows on a device and as the host's NumPy array; a slice is either."""
    if isinstance(rows, slice):
        return rows, rows
    [there], [here] = to_device(device, rows), to_host(rows)
    return there, here.numpy()


def _real(lengths: Tensor, generated: Tensor | None, width: int) -> Tensor:
    """Bool `(N, width)`: real tokens of responses of these lengths, of which `generated` are the policy's own."""
    real = torch.arange(width, device=lengths.device) < lengths[:, None]
    return real if generated is None else real & generated[:, :width]
