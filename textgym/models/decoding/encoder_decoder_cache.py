"""CachedEncoderDecoder: last hidden states of a batch of growing responses; each prompt is encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from textgym.models.architectures.attention import additive_mask, check_encoder_decoder
from textgym.models.architectures.encoder_decoder import EncoderDecoderRows, encode
from textgym.models.architectures.positions import check_positions
from textgym.models.decoding.cached_decoder import CachedDecoder, SlotCache


@dataclass
class KeysValues:
    """Keys and values of a layer's cross-attention, `(b, heads, P, head_size)` each."""

    keys: Tensor
    values: Tensor


class DecoderSlots(SlotCache):
    """A `SlotCache` for models that derive positions from the cache's length; all rows of a pass are equally long."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens before those of this pass."""
        return 0 if self.positions is None else self.span - 1


class PromptSlots(Cache):
    """Keys and values of the encoded prompts, for cross-attention."""

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.num_rows, self.max_tokens = num_rows, max_tokens
        self.stored: list[KeysValues] = []
        self.rows: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values `(b, heads, L, head_size)` of the prompts in the rows of this pass."""
        if layer_idx == len(self.stored):
            shape = (self.num_rows, key_states.shape[1], self.max_tokens, key_states.shape[3])
            self.stored.append(KeysValues(key_states.new_zeros(shape), value_states.new_zeros(shape)))
        layer, rows = self.stored[layer_idx], slice(None) if self.rows is None else self.rows
        layer.keys[rows, :, : key_states.shape[2]] = key_states
        layer.values[rows, :, : value_states.shape[2]] = value_states
        return key_states, value_states

    def read(self, rows: Tensor | None, span: int) -> None:
        """Read the first `span` slots of these rows in the next pass; `None` for all rows."""
        chosen = slice(None) if rows is None else rows
        layers: list[Any] = [  # transformers reads only `keys` and `values` of these layers
            KeysValues(layer.keys[:, :, :span][chosen], layer.values[:, :, :span][chosen]) for layer in self.stored
        ]
        self.layers = layers


class CachedEncoderDecoder:
    """Compute the decoder's last hidden states for a batch of prompts with growing responses.

    As in `CachedDecoder`, `advance` compares its arguments with those of the last call, so rows may restart at any
    time, every observation is valid, and the result equals a full forward pass. A prompt is encoded once, and the keys
    and values of its cross-attention are cached. These models derive positions from the length of the cache, which is
    the same for all rows, so rows are decoded in groups of equal length. If all episodes start together there is one
    group.

    Args:
        model: An encoder-decoder model of transformers.
        num_rows: Number of rows in the batch, `B`.
        max_prompt_tokens: Maximum length of a prompt, `P`.
        max_tokens: Maximum number of tokens of the decoder, with start tokens, `D`.
    """

    def __init__(self, model: Any, num_rows: int, max_prompt_tokens: int, max_tokens: int) -> None:
        self.num_rows, self.max_prompt_tokens = num_rows, max_prompt_tokens
        self.decoder = _Responses(model, num_rows, max_tokens, max_prompt_tokens)
        self.reset()

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B, P, D)`."""
        return self.num_rows, self.max_prompt_tokens, self.decoder.max_tokens

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """The arguments of the last call of `advance`."""
        return EncoderDecoderRows(self.input_ids, self.lengths, self.decoder.input_ids, self.decoder.lengths)

    def of_model(self, model: Any) -> CachedEncoderDecoder:
        """Return a decoder of another encoder-decoder model for prompts and responses of the same shapes."""
        check_encoder_decoder(model, wanted=True)
        return CachedEncoderDecoder(model, self.num_rows, self.max_prompt_tokens, self.decoder.max_tokens)

    def reset(self) -> None:
        """Remove all prompts and responses and free the caches."""
        self.decoder.reset()
        device = self.decoder.model.device
        self.input_ids = torch.zeros(self.num_rows, self.max_prompt_tokens, dtype=torch.long, device=device)
        self.lengths = torch.zeros(self.num_rows, dtype=torch.long, device=device)
        self.slots = torch.arange(self.max_prompt_tokens, device=device)

    @property
    def nbytes(self) -> int:
        """Size of the caches in bytes, with the prompts' cache."""
        return self.decoder.nbytes

    @torch.no_grad()
    def advance(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        decoder_input_ids: Tensor,
        decoder_lengths: Tensor,
    ) -> Tensor:
        """Return the decoder's last hidden state of every row.

        Args:
            input_ids: `(B, P)`, prompts, right-padded.
            lengths: `(B,)`, number of tokens of each prompt, at least 1.
            decoder_input_ids: `(B, D)`, start tokens and responses, right-padded.
            decoder_lengths: `(B,)`, number of tokens of the decoder, at least 1.

        Returns:
            `(B, d)`, in the model's dtype; a new tensor.

        Raises:
            ValueError: If the shapes are not those of this object, or a prompt or response is empty.
        """
        if input_ids.shape != (self.num_rows, self.max_prompt_tokens):
            expected = (self.num_rows, self.max_prompt_tokens)
            raise ValueError(f"expected input_ids of shape {expected}, got {tuple(input_ids.shape)}")
        if self.decoder.outdated:
            self.reset()
        same = ((input_ids == self.input_ids) | (self.slots >= self.lengths[:, None])).all(1)
        new = ~(same & (lengths == self.lengths))
        num_new, shortest = torch.stack((new.sum(), lengths.min())).tolist()
        if shortest < 1:
            raise ValueError("a prompt is empty: give it at least one token")
        if num_new:
            rows = None if num_new == self.num_rows else new.nonzero()[:, 0]
            self.decoder.take_prompts(rows, input_ids, lengths)
            self.input_ids.copy_(input_ids)
            self.lengths.copy_(lengths)
        return self.decoder.advance(decoder_input_ids, decoder_lengths)


class _Responses(CachedDecoder):
    """A `CachedDecoder` of the responses, whose cross-attention reads the encoded prompts."""

    def __init__(self, model: Any, num_rows: int, max_tokens: int, max_prompt_tokens: int) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        super().__init__(model, num_rows, max_tokens)

    def reset(self) -> None:
        """Remove prompts and responses and free the caches."""
        super().reset()
        self.cache = DecoderSlots(self.num_rows, self.max_tokens)
        self.prompts = PromptSlots(self.num_rows, self.max_prompt_tokens)
        self.both = EncoderDecoderCache(self.cache, self.prompts)
        self.encoder_hidden: Tensor | None = None  # (B, P, d)
        self.encoder_mask = self.slots.new_zeros(self.num_rows, self.max_prompt_tokens)
        self.prompt_span = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes of the responses' cache and of the prompts' hidden states, keys and values."""
        hidden = 0 if self.encoder_hidden is None else self.encoder_hidden.nbytes
        return super().nbytes + hidden + sum(x.keys.nbytes + x.values.nbytes for x in self.prompts.stored)

    def take_prompts(self, rows: Tensor | None, input_ids: Tensor, lengths: Tensor) -> None:
        """Encode the prompts `(B, P)` of some rows, and remove their responses."""
        self.prompt_span = int(lengths.max())
        check_positions(self.model.config, self.prompt_span, "a prompt")
        chosen = slice(None) if rows is None else rows
        hidden, mask = encode(self.model, input_ids[chosen], lengths[chosen])
        if self.encoder_hidden is None:
            self.encoder_hidden = hidden.new_zeros(self.num_rows, self.max_prompt_tokens, hidden.shape[-1])
        width = mask.shape[1]
        self.encoder_hidden[chosen, :width] = hidden
        self.encoder_mask[chosen] = 0
        self.encoder_mask[chosen, :width] = mask
        self.lengths[chosen] = 0

    def _encode(self, input_ids: Tensor, lengths: Tensor, rows: Tensor | None, width: int | None = None) -> None:
        self.prompts.rows = self.reading = rows
        self.both.is_updated = {}  # transformers then computes and stores the keys and values of cross-attention
        super()._encode(input_ids, lengths, rows, width)

    def _decode(self, input_ids: Tensor, lengths: Tensor, rows: Tensor | None, span: int) -> None:
        """Decode one new token of some rows, in groups of equal length."""
        sizes = (lengths if rows is None else lengths[rows]).unique().tolist()
        for size in sizes:
            group = rows
            if len(sizes) > 1:
                group = (lengths == size).nonzero()[:, 0] if rows is None else rows[lengths[rows] == size]
            self.prompts.read(group, self.prompt_span)
            self.reading = group
            super()._decode(input_ids, lengths, group, size)

    def _forward(self, input_ids: Tensor, positions: Tensor, allowed: Tensor, distance: Tensor) -> Tensor:
        assert self.encoder_hidden is not None  # prompts are encoded before responses
        chosen = slice(None) if self.reading is None else self.reading
        output = self.model.base_model.get_decoder()(
            input_ids=input_ids,
            attention_mask=additive_mask(allowed.expand(len(input_ids), -1, -1, -1), self.model.dtype),
            encoder_hidden_states=self.encoder_hidden[chosen, : self.prompt_span],
            encoder_attention_mask=self.encoder_mask[chosen, : self.prompt_span],
            past_key_values=self.both,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden  # (b, Q, d)
