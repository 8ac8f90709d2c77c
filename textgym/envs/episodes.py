"""Episodes: the tokens of a batch of rows. Only this module appends tokens."""

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
"""Episode numbers, unique in this process."""


class Ends(NamedTuple):
    """Rows whose episode ended with this token, by a stop token or by length, bool `(B,)` each."""

    by_stop: Tensor
    by_length: Tensor


class Episodes:
    """B rows of tokens, each a prompt and a growing response, right-padded so that the slot of a token is its position.

    A row is alive from `begin` until its episode ends; `append` does not change other rows. Tokens are on the device,
    and lengths are also on the host, so that the host rarely has to wait for the device.

    Args:
        num_rows: Number of rows, B.
        max_prompt_tokens: Maximum length of a prompt.
        max_new_tokens: Maximum length of a response, at which it ends.
        stop: Stop tokens and the minimum length of a response.
        vocab_size: Number of tokens, V.
        pad_token_id: Token in empty slots.
        device: Device of the tokens.
        decoder_start: For encoder-decoder models, the token ids of the decoder before the response.
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
        self.generated = torch.ones(num_rows, max_new_tokens, dtype=torch.bool, device=device)  # True: by the policy
        self.is_stop = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.is_stop[list(stop.ids)] = True
        self.prompts = np.full(num_rows, b"", dtype=object)  # ids as bytes, see `first_tokens`
        self.host_prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self.host_lengths = np.zeros(num_rows, dtype=np.int64)
        self.replied = np.zeros(num_rows, dtype=bool)  # rows in which the environment has inserted tokens
        self.numbers = np.zeros(num_rows, dtype=np.int64)  # episode numbers, see `Shown`

    @property
    def response_lengths(self) -> Tensor:
        """`(B,)`, number of response tokens so far."""
        return self.lengths - self.prompt_lengths

    def begin(self, rows: np.ndarray, prompts: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Start new episodes in some rows.

        Args:
            rows: Indices of the rows, `(k,)`.
            prompts: Ids of their prompts, `(k, P)`, right-padded.
            lengths: Lengths of the prompts, `(k,)`.

        Returns:
            The indices of the rows on the device.
        """
        host_ids, host_lengths = torch.from_numpy(prompts).long(), torch.from_numpy(lengths)
        index, ids, sizes = to_device(self.input_ids.device, torch.from_numpy(rows), host_ids, host_lengths)
        width = prompts.shape[1]
        padded = torch.full((len(rows), self.width), self.pad_token_id, dtype=torch.long, device=index.device)
        padded[:, :width] = torch.where(self.slots[:width] < sizes[:, None], ids, self.pad_token_id)
        self.input_ids[index] = padded
        self.lengths[index] = self.prompt_lengths[index] = sizes
        self.generated[index] = True
        self.alive[index] = True
        self.prompts[rows] = first_tokens(host_ids, host_lengths)
        self.host_lengths[rows] = self.host_prompt_lengths[rows] = lengths
        self.replied[rows] = False
        self.numbers[rows] = [next(NUMBERS) for _ in rows]
        return index

    def ends(self, actions: Tensor) -> Ends:
        """Return which rows one more token `(B,)` would end, without appending it."""
        before = self.response_lengths
        by_stop = self.alive & self.is_stop[actions] & (before >= self.stop.min_new_tokens)
        by_length = (self.alive ^ by_stop) & (before >= self.max_new_tokens - 1)
        return Ends(by_stop, by_length)

    def append(self, actions: Tensor, ends: Ends, alive: np.ndarray) -> None:
        """Append one token to every row that is alive, and end the rows that it ends.

        Args:
            actions: `(B,)` token ids.
            ends: The result of `ends(actions)`.
            alive: The rows that are alive, bool `(B,)`, on the host.
        """
        slot = self.lengths.clamp(max=self.width - 1)[:, None]  # full rows have ended, and their token is not changed
        unchanged = self.input_ids.gather(1, slot)[:, 0]
        self.input_ids.scatter_(1, slot, torch.where(self.alive, actions, unchanged)[:, None])
        self.lengths += self.alive
        self.host_lengths += alive
        self.alive = self.alive ^ (ends.by_stop | ends.by_length)

    def extend(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, np.ndarray]:
        """Append whole responses to rows whose episodes have just begun, and end the episodes.

        Args:
            tokens: Responses `(B, T)`; positions after their end are ignored.
            lengths: Lengths of the responses, `(B,)`.

        Returns:
            Bool `(B,)`, the rows that a stop token ended, on the device and on the host.

        Raises:
            ValueError: If a response is empty or too long, continues after a stop token, or ends too early without one.
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
                f"{self.max_new_tokens} tokens, and be submitted only once: call envs.reset() first"
            )
        rows, indices = ragged(lengths, int(counts.sum()))
        self.input_ids[rows, self.prompt_lengths[rows] + indices] = tokens[rows, indices]
        self.lengths += lengths
        self.host_lengths += counts.numpy()
        self.alive[:] = False
        return by_stop, ended_by_stop.numpy()

    def reply(self, row: int, tokens: list[int]) -> None:
        """Append tokens of the environment to a row, which then continues.

        The row must have room for these tokens and one more.
        """
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
        """Number of slots of the ids and masks in an observation, by the prefix of their names."""
        if not self.decoder_start:
            return {"": self.width}
        return {"": self.width - self.max_new_tokens, "decoder_": len(self.decoder_start) + self.max_new_tokens}

    def observation(self) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, int64 `(B, W)`, as new tensors.

        For encoder-decoder models they are the prompt, `(B, P)`, and there are also `decoder_input_ids` and
        `decoder_attention_mask`, `(B, S + T)`, the start tokens and the response.
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
        """Return bool `(B, V)`: all tokens, without stop tokens in rows whose response is still too short to end."""
        return self.stop.allowed(self.response_lengths, self.vocab_size)

    def restricts_actions(self) -> bool:
        """Return whether any action is ever masked out."""
        return self.stop.min_new_tokens > 0 and bool(self.stop.ids)

    def sequences(self) -> Sequences:
        """Return a copy of all rows as whole sequences."""
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
