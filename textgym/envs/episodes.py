"""Episodes: the token state of a batch of rows. The one place where a token is appended."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from textgym.models.architectures.attention import first_tokens, ragged
from textgym.models.architectures.encoder_decoder import split_rows
from textgym.models.decoding.contexts import Shown
from textgym.models.distributions.log_probs import StopRule
from textgym.models.machine.devices import Device
from textgym.models.machine.transfer import to_device, to_host
from textgym.models.sequences import HostRows, Sequences

NUMBERS = itertools.count(1)
"""Of the episodes of all environments of this process."""


class Ends(NamedTuple):
    """Rows that ended with this token: by a stop token or by length, bool `(B,)` each."""

    by_stop: Tensor
    by_length: Tensor


class Episodes:
    """B rows of tokens, each a prompt and a growing response, right-padded so that a token's slot is its position.

    A row is alive from `begin` until it ends; rows that are not alive ignore what is appended. Tokens are on the
    device, and the host keeps count of them, so that it hardly ever has to wait.

    Args:
        num_rows: B.
        max_prompt_tokens: longest prompt.
        max_new_tokens: a response ends at this length.
        stop: which tokens end a row, and the shortest response.
        vocab_size: V.
        pad_token_id: what fills the slots not yet written.
        device: where the state lives.
        decoder_start: for encoder-decoder models, the token ids that the decoder begins with, before the response.
    """

    def __init__(
        self,
        num_rows: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        stop: StopRule,
        vocab_size: int,
        pad_token_id: int,
        device: Device = None,
        decoder_start: tuple[int, ...] = (),
    ) -> None:
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens
        self.width = max_prompt_tokens + max_new_tokens
        self.stop, self.vocab_size, self.pad_token_id = stop, vocab_size, pad_token_id
        self.decoder_start = decoder_start
        self.input_ids = torch.full((num_rows, self.width), pad_token_id, dtype=torch.long, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.prompt_lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.alive = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.slots = torch.arange(self.width, device=device)
        self.generated = torch.ones(num_rows, max_new_tokens, dtype=torch.bool, device=device)  # by the policy
        self.is_stop = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.is_stop[list(stop.ids)] = True
        self.prompts = np.full(num_rows, b"", dtype=object)  # their ids, as `first_tokens` gives them
        self.host_prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self.host_lengths = np.zeros(num_rows, dtype=np.int64)
        self.replied = np.zeros(num_rows, dtype=bool)  # rows in which the environment has written
        self.numbers = np.zeros(num_rows, dtype=np.int64)  # of the episodes, see `Shown`

    @property
    def response_lengths(self) -> Tensor:
        """`(B,)`, tokens appended so far."""
        return self.lengths - self.prompt_lengths

    def begin(self, rows: np.ndarray, prompts: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Starts rows `(k,)` anew with right-padded prompts `(k, P)` of these lengths `(k,)`.

        Returns:
            The rows, on the device.
        """
        host_ids, host_lengths = torch.from_numpy(prompts).long(), torch.from_numpy(lengths)
        index, ids, sizes = to_device(self.input_ids.device, torch.from_numpy(rows), host_ids, host_lengths)
        width = prompts.shape[1]
        fresh = torch.full((len(rows), self.width), self.pad_token_id, dtype=torch.long, device=index.device)
        fresh[:, :width] = torch.where(self.slots[:width] < sizes[:, None], ids, self.pad_token_id)
        self.input_ids[index] = fresh
        self.lengths[index] = self.prompt_lengths[index] = sizes
        self.generated[index] = True
        self.alive[index] = True
        self.prompts[rows] = first_tokens(host_ids, host_lengths)
        self.host_lengths[rows] = self.host_prompt_lengths[rows] = lengths
        self.replied[rows] = False
        self.numbers[rows] = [next(NUMBERS) for _ in rows]
        return index

    def ends(self, actions: Tensor) -> Ends:
        """Which rows one token more `(B,)` would end; nothing changes."""
        before = self.response_lengths
        by_stop = self.alive & self.is_stop[actions] & (before >= self.stop.min_new_tokens)
        by_length = (self.alive ^ by_stop) & (before >= self.max_new_tokens - 1)
        return Ends(by_stop, by_length)

    def append(self, actions: Tensor, ends: Ends, alive: np.ndarray) -> None:
        """Appends one token `(B,)` to every row that is `alive`, bool `(B,)`, and ends those that it `ends`."""
        slot = self.lengths.clamp(max=self.width - 1)[:, None]
        kept = self.input_ids.gather(1, slot)[:, 0]
        self.input_ids.scatter_(1, slot, torch.where(self.alive, actions, kept)[:, None])
        self.lengths += self.alive
        self.host_lengths += alive
        self.alive = self.alive ^ (ends.by_stop | ends.by_length)

    def extend(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, np.ndarray]:
        """Appends whole responses `(B, T)` of these lengths to rows that have just begun, and ends them.

        Returns:
            Bool `(B,)`, the rows that a stop token ended, on the device and on the host.

        Raises:
            ValueError: a response that is empty or too long, goes on after a stop token, or ends without one too early.
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        stops = self.is_stop[tokens] & (steps >= self.stop.min_new_tokens) & (steps < lengths[:, None])  # (B, T)
        by_stop = stops.any(1)
        ends = torch.where(by_stop, stops.int().argmax(1) + 1, self.max_new_tokens)
        whole = self.alive & (self.response_lengths == 0) & (ends == lengths)
        whole, ended_by_stop, counts = to_host(whole, by_stop, lengths)
        if not whole.all():
            raise ValueError(
                "a response must end with its first stop token, or without one after max_new_tokens="
                f"{self.max_new_tokens} tokens, and be written once: call envs.reset() first"
            )
        rows, places = ragged(lengths, int(counts.sum()))
        self.input_ids[rows, self.prompt_lengths[rows] + places] = tokens[rows, places]
        self.lengths += lengths
        self.host_lengths += counts.numpy()
        self.alive[:] = False
        return by_stop, ended_by_stop.numpy()

    def reply(self, row: int, tokens: list[int]) -> None:
        """Lets the environment write into a row, which then goes on; there must be room for them and one token more."""
        start = int(self.host_lengths[row])
        step = start - int(self.host_prompt_lengths[row])
        self.input_ids[row, start : start + len(tokens)] = torch.tensor(tokens, device=self.input_ids.device)
        self.generated[row, step : step + len(tokens)] = False
        self.lengths[row] += len(tokens)
        self.host_lengths[row] += len(tokens)
        self.replied[row] = True
        self.alive[row] = True

    @property
    def widths(self) -> dict[str, int]:
        """Slots of the ids and masks in an observation, by what their names begin with."""
        if not self.decoder_start:
            return {"": self.width}
        return {"": self.width - self.max_new_tokens, "decoder_": len(self.decoder_start) + self.max_new_tokens}

    def observation(self) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 `(B, W)`, fresh tensors.

        For encoder-decoder models `(B, P)`, the prompt, with `decoder_input_ids` and `decoder_attention_mask`
        `(B, S + T)`, the start tokens and the response.
        """
        if not self.decoder_start:
            mask = (self.slots < self.lengths[:, None]).long()
            tensors = {"input_ids": self.input_ids.clone(), "attention_mask": mask}
            return Shown(tensors, self.numbers.copy(), self.host_lengths.copy())
        return split_rows(
            self.input_ids,
            self.prompt_lengths,
            self.response_lengths,
            self.decoder_start,
            self.width - self.max_new_tokens,
            self.max_new_tokens,
            self.pad_token_id,
        ).observation()

    def action_masks(self) -> Tensor:
        """Bool `(B, V)`: every token, except stop tokens where the response is still too short to end."""
        return self.stop.allowed(self.response_lengths, self.vocab_size)

    def restricts_actions(self) -> bool:
        """Whether any action is ever masked out."""
        return self.stop.min_new_tokens > 0 and bool(self.stop.ids)

    def sequences(self) -> Sequences:
        """All rows as whole sequences, a copy."""
        host = None
        if not self.replied.any():
            lengths = self.host_lengths - self.host_prompt_lengths
            host = HostRows(self.prompts.copy(), self.host_prompt_lengths.copy(), lengths, lengths)
        return Sequences(
            self.input_ids.clone(),
            self.prompt_lengths.clone(),
            self.response_lengths,
            self.stop,
            self.generated.clone() if self.replied.any() else None,
            self.decoder_start,
            host,
        )
