"""CachedDecoder: last hidden states of a batch of growing contexts, with a key-value cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from textgym.models.architectures.attention import attention_mask, batches_by_length, check_encoder_decoder
from textgym.models.architectures.positions import check_positions, position_limit
from textgym.models.machine.transfer import to_device, to_host


class NumberedContexts(NamedTuple):
    """Episode number and context length of each row, `(B,)` each, for contexts that only grow within an episode."""

    episodes: np.ndarray
    lengths: np.ndarray

    def continues(self, before: NumberedContexts) -> np.ndarray:
        """Return bool `(B,)`: whether each context starts with the context that it had before."""
        return self.episodes == before.episodes


class PlainContexts(NamedTuple):
    """Contexts in host memory: ids `(B, W)`, right-padded, and lengths `(B,)`."""

    input_ids: np.ndarray
    lengths: np.ndarray

    def continues(self, before: PlainContexts) -> np.ndarray:
        """Return bool `(B,)`: whether each context starts with the context that it had before."""
        beyond = np.arange(self.input_ids.shape[1]) >= before.lengths[:, None]
        return ((self.input_ids == before.input_ids) | beyond).all(1)


HostContexts = NumberedContexts | PlainContexts
"""Information about contexts in host memory. With it the decoder finds changed rows without waiting for the device."""


class SlotCache(Cache):
    """A static key-value cache in which the slot of a token is its position in its row.

    The decoder sets the kind of the next forward pass before it: after `fill(rows)` the pass stores whole contexts from
    position 0; after `extend(rows, positions, span)` it stores one token in each row and attends to all slots in use.
    """

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.num_rows, self.max_tokens = num_rows, max_tokens
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.span = 0

    def fill(self, rows: Tensor | None) -> None:
        """Store whole contexts, from position 0, in these rows in the next pass; `None` for all rows."""
        self.rows, self.positions = rows, None

    def extend(self, rows: Tensor | None, positions: Tensor, span: int) -> None:
        """Store one token in each row at `positions` `(b,)` in the next pass, and attend to the first `span` slots."""
        self.rows, self.positions, self.span = rows, positions, span

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store states `(b, heads, Q, head_size)` of a layer; return the keys and values that its queries attend to."""
        if layer_idx == len(self.keys):
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                store.append(states.new_zeros(self.num_rows, states.shape[1], self.max_tokens, states.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.positions is None:
            rows = slice(None) if self.rows is None else self.rows
            keys[rows, :, : key_states.shape[2]] = key_states
            values[rows, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        rows = torch.arange(self.num_rows, device=keys.device) if self.rows is None else self.rows
        keys[rows, :, self.positions] = key_states[:, :, 0]
        values[rows, :, self.positions] = value_states[:, :, 0]
        keys, values = keys[:, :, : self.span], values[:, :, : self.span]
        return (keys, values) if self.rows is None else (keys[self.rows], values[self.rows])

    def take(self, other: SlotCache, rows: Tensor) -> None:
        """Copy the rows `(num_rows,)` of another cache of the same model."""
        if not self.keys:
            self.keys = [states.new_empty(self.num_rows, *states.shape[1:]) for states in other.keys]
            self.values = [states.new_empty(self.num_rows, *states.shape[1:]) for states in other.values]
        for target, states in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            torch.index_select(states, 0, rows, out=target)

    def spread(self, rows: Tensor, span: int) -> None:
        """Copy the first `span` slots of row `rows[i]` to row i, for every i; `rows` is `(num_rows,)`."""
        for states in (*self.keys, *self.values):
            states[:, :, :span] = states[rows, :, :span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: transformers calls this, but the value is unused, because the decoder passes position ids."""
        return 0


class CachedDecoder:
    """Compute last hidden states of a batch of contexts with a static key-value cache.

    `advance` compares the contexts with those of its last call. A row that grew by one token decodes this token; a row
    that did not change needs no computation; all other rows are encoded again in one batch. So rows may restart at any
    time, every observation is valid, and the result equals a full forward pass.

    The cache is emptied when weights change, which torch's version counters show. Fused optimisers do not increase
    these counters, so call `reset` after a step of one, as `ActorCritic` does.

    Args:
        model: A causal language model of transformers with full or sliding-window attention.
        num_rows: Number of rows in the batch, `B`.
        max_tokens: Maximum length of a context, `W`.
    """

    def __init__(self, model: Any, num_rows: int, max_tokens: int) -> None:
        self.model, self.num_rows, self.max_tokens = model, num_rows, max_tokens
        self.parameters = list(model.parameters())
        self.limit = position_limit(model.config)  # read once, for configs are slow to ask
        self.reset()

    @property
    def shape(self) -> tuple[int, int]:
        """`(B, W)`."""
        return self.num_rows, self.max_tokens

    @property
    def seen(self) -> tuple[Any, ...]:
        """The arguments of the last call of `advance`."""
        return self.input_ids, self.lengths, self.host

    @property
    def outdated(self) -> bool:
        """Whether weights have changed since the cache was filled."""
        return self.version != self._weights_version()

    def of_model(self, model: Any) -> CachedDecoder:
        """Return a decoder of another causal model for contexts of the same shape."""
        check_encoder_decoder(model, wanted=False)
        return CachedDecoder(model, self.num_rows, self.max_tokens)

    def reset(self) -> None:
        """Remove all contexts and free the cache."""
        device = self.model.device
        self.cache = SlotCache(self.num_rows, self.max_tokens)
        self.input_ids = torch.zeros(self.num_rows, self.max_tokens, dtype=torch.long, device=device)
        self.lengths = torch.zeros(self.num_rows, dtype=torch.long, device=device)
        self.slots = torch.arange(self.max_tokens, device=device)
        self.hidden: Tensor | None = None  # (B, d)
        self.host: HostContexts | None = None
        self.longest = 0  # length of the longest context in the last call of `begin`
        self.version = self._weights_version()

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes."""
        return sum(states.nbytes for states in (*self.cache.keys, *self.cache.values))

    @torch.no_grad()
    def advance(self, input_ids: Tensor, lengths: Tensor, host: HostContexts | None = None) -> Tensor:
        """Return the last hidden state of every context.

        Args:
            input_ids: `(B, W)`, right-padded.
            lengths: `(B,)`, number of tokens of each context, at least 1.
            host: The same contexts as the host knows them; without it the host waits for a comparison on the device.

        Returns:
            `(B, d)`, in the model's dtype; a new tensor.

        Raises:
            ValueError: If the shape is not the decoder's, or a context is empty or too long for the model.
        """
        if input_ids.shape != (self.num_rows, self.max_tokens):
            raise ValueError(f"expected input_ids of shape {(self.num_rows, self.max_tokens)}, got {input_ids.shape}")
        if self.outdated:
            self.reset()
        grown, other, sizes = self._changes(input_ids, lengths, host)
        if sizes.min() < 1:
            raise ValueError("a context is empty: begin it with at least one token")
        if self.limit is not None and sizes.max() > self.limit:
            check_positions(self.model.config, int(sizes.max()), "a context")
        if other.any():
            self._encode(input_ids, lengths, self._index(other), int(sizes[other].max()))
        if grown.any():
            self._decode(input_ids, lengths, self._index(grown), int(sizes.max()))
        self.input_ids.copy_(input_ids)
        self.lengths.copy_(lengths)
        self.host = host
        return self._states().clone()

    def _changes(
        self, input_ids: Tensor, lengths: Tensor, host: HostContexts | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which rows grew by one token, which rows changed otherwise, and lengths, `(B,)` each on the host."""
        if host is not None and type(host) is type(self.host):
            continues, before, now = host.continues(self.host), self.host.lengths, host.lengths  # type: ignore[arg-type]
            longer = continues & (now == before + 1)
            return longer, ~longer & ~(continues & (now == before)), now
        same = (input_ids == self.input_ids) | (self.slots >= self.lengths[:, None])
        same = same.all(1) & (self.lengths > 0)
        grown = same & (lengths == self.lengths + 1)
        other = ~grown & ~(same & (lengths == self.lengths))
        grown, other, lengths = to_host(grown, other, lengths)  # the only place where a step waits for the device
        return grown.numpy(), other.numpy(), lengths.numpy()

    def _index(self, rows: np.ndarray) -> Tensor | None:
        """Return the indices of the rows that are True in a bool array `(B,)`; `None` for all rows."""
        if rows.all():
            return None
        [index] = to_device(self.slots.device, torch.from_numpy(np.flatnonzero(rows)))
        return index

    # --- For a caller whose contexts always grow by one token: no comparison, so the host need not wait ---

    @torch.no_grad()
    def begin(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the last hidden states `(B, d)` of new contexts `(B, W)` in all rows.

        Contexts of similar length are encoded in one pass, and equal contexts only once. The host waits for the device
        once.
        """
        sizes, first = _first_equal_rows(input_ids, lengths)
        self.longest = max(sizes)
        unique = sorted(set(first))  # one row for each different context
        by_length = batches_by_length([sizes[row] for row in unique], len(unique))
        batches = [[unique[i] for i in batch] for batch in by_length]

        order = [row for batch in batches for row in batch]
        rows, source = to_device(lengths.device, torch.tensor(order), torch.tensor(first))
        for batch, chosen in zip(batches, rows.split([len(batch) for batch in batches]), strict=True):
            width = max(sizes[row] for row in batch)
            self._encode(input_ids, lengths, None if len(batch) == len(sizes) else chosen, width)

        if len(unique) < len(sizes):
            self.cache.spread(source, self.longest)
            self._store(None, self._states()[source])
        self.input_ids.copy_(input_ids)
        self.lengths.copy_(lengths)
        self.host = None
        return self._states()

    @torch.no_grad()
    def extend(self, tokens: Tensor, span: int) -> Tensor:
        """Append one token `(B,)` to every row and return the last hidden states `(B, d)`.

        Args:
            tokens: `(B,)`.
            span: Upper bound of the lengths after this token; attention reads this number of slots.
        """
        self.input_ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths += 1
        self._decode(self.input_ids, self.lengths, None, span)
        return self._states()

    def take(self, other: CachedDecoder, rows: Tensor) -> None:
        """Copy the rows `(B,)` of another decoder of the same model and width, and continue from them."""
        self.cache.take(other.cache, rows)
        self.input_ids.copy_(other.input_ids[rows])
        self.lengths.copy_(other.lengths[rows])

    def _encode(self, input_ids: Tensor, lengths: Tensor, rows: Tensor | None, width: int | None = None) -> None:
        """Encode whole contexts of some rows in one pass.

        Right padding needs no mask, because with causal attention no token attends to a later one.

        Args:
            input_ids: `(B, W)`.
            lengths: `(B,)`.
            rows: Indices of the rows; `None` for all.
            width: Length of the longest of these contexts, if the host knows it.
        """
        if rows is not None:
            input_ids, lengths = input_ids[rows], lengths[rows]
        width = int(lengths.max()) if width is None else width
        positions = self.slots[None, :width]
        distance = (self.slots[:width, None] - self.slots[None, :width])[None, None]  # (1, 1, Q, K)
        self.cache.fill(rows)
        hidden = self._forward(input_ids[:, :width], positions.expand(len(lengths), -1), distance >= 0, distance)
        self._store(rows, hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1])

    def _decode(self, input_ids: Tensor, lengths: Tensor, rows: Tensor | None, span: int) -> None:
        """Decode one new token of some rows, which attends to the first `span` slots."""
        if rows is not None:
            input_ids, lengths = input_ids[rows], lengths[rows]
        positions = lengths - 1
        tokens = input_ids.gather(1, positions[:, None])
        distance = (positions[:, None] - self.slots[:span])[:, None, None]  # (b, 1, 1, K)
        self.cache.extend(rows, positions, span)
        hidden = self._forward(tokens, positions[:, None], distance >= 0, distance)
        self._store(rows, hidden[:, 0])

    def _forward(self, input_ids: Tensor, positions: Tensor, allowed: Tensor, distance: Tensor) -> Tensor:
        """Return hidden states; `allowed` is which keys each query attends to, `distance` query minus key position."""
        output = self.model.base_model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=attention_mask(self.model, allowed, distance),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state  # (b, Q, d)

    def _store(self, rows: Tensor | None, hidden: Tensor) -> None:
        if rows is None:
            self.hidden = hidden
            return
        if self.hidden is None:
            self.hidden = hidden.new_zeros(self.num_rows, hidden.shape[-1])
        self.hidden[rows] = hidden

    def _states(self) -> Tensor:
        assert self.hidden is not None, "call this after a forward pass"
        return self.hidden

    def _weights_version(self) -> int:
        """Return a number that increases whenever a weight changes in place, by an optimiser or `load_state_dict`."""
        return sum(parameter._version for parameter in self.parameters)


def _first_equal_rows(input_ids: Tensor, lengths: Tensor) -> tuple[list[int], list[int]]:
    """Return the length of each context `(B, W)`, and the first row that has the same context."""
    host = torch.cat((lengths[:, None], input_ids), dim=1).cpu().numpy()
    sizes: list[int] = host[:, 0].tolist()
    rows: dict[bytes, int] = {}
    first = [rows.setdefault(host[row, : size + 1].tobytes(), row) for row, size in enumerate(sizes)]
    return sizes, first
