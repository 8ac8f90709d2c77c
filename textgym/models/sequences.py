"""Sequences: prompts with their responses, the form in which whole episodes are scored and trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from textgym.models.attention import PackedStates, States, ragged
from textgym.models.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates, split_rows
from textgym.models.log_probs import StopRule


@dataclass(frozen=True)
class Sequences:
    """N prompts with their responses. Masks come from lengths, never from token ids (trap 8).

    Attributes:
        input_ids: `(N, W)` int64, right-padded: prompt, then response.
        prompt_lengths: `(N,)`, at least 1.
        response_lengths: `(N,)`, at least 1.
        stop: which tokens end a response and how early they may, see `StopRule`.
        written: bool `(N, T)` or wider, the response tokens that the policy wrote; `None` where it wrote all. What an
            environment put in between, such as the replies of a game, is context: no loss, no KL, no value (trap 33).
        decoder_start: for encoder-decoder models, the token ids that the decoder begins with, before the response.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    stop: StopRule = field(default_factory=StopRule)
    written: Tensor | None = None
    decoder_start: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Tensor | slice) -> Sequences:
        """Some of the rows."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            prompt_lengths=self.prompt_lengths[rows],
            response_lengths=self.response_lengths[rows],
            written=None if self.written is None else self.written[rows],
        )

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            prompt_lengths=self.prompt_lengths.to(device),
            response_lengths=self.response_lengths.to(device),
            written=None if self.written is None else self.written.to(device),
        )

    @property
    def mask(self) -> Tensor:
        """Bool `(N, T)`, T the longest response: the real response tokens that the policy wrote."""
        steps = torch.arange(int(self.response_lengths.max()), device=self.input_ids.device)
        real = steps < self.response_lengths[:, None]
        return real if self.written is None else real & self.written[:, : len(steps)]

    @property
    def steps(self) -> tuple[Tensor, Tensor]:
        """Row and place in the response of each token that the policy wrote, `(M,)` each."""
        if self.written is None:
            return ragged(self.response_lengths)
        rows, steps = self.mask.nonzero(as_tuple=True)
        return rows, steps

    @property
    def lengths(self) -> Tensor:
        """`(N,)`, prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
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
        mask = self.mask
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)

    def states(self) -> States:
        """The states before each response token. The last token is left out: nothing is predicted from it."""
        rows, steps = self.steps
        if self.decoder_start:
            split = self.split(self.response_lengths - 1)
            return EncoderDecoderStates(split, rows, len(self.decoder_start) + steps - 1)
        sizes = self.prompt_lengths[rows] + steps
        return PackedStates.prefixes(self.input_ids, self.lengths - 1, rows, sizes, self.prompt_lengths)

    def split(self, response_lengths: Tensor) -> EncoderDecoderRows:
        """The rows as encoder and decoder read them, each response up to a length `(N,)`; as wide for any of these."""
        longest = int(self.prompt_lengths.max()), int(self.response_lengths.max())
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
