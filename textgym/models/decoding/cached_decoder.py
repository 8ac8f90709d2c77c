"""CachedDecoder: the last hidden state of a batch of growing contexts, one token's work for one token."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from textgym.models.architectures.attention import attention_mask, batches_by_length, check_encoder_decoder
from textgym.models.architectures.positions import check_positions
from textgym.models.machine.transfer import to_device, to_host


class NumberedContexts(NamedTuple):
    """Contexts of episodes that only ever grow: the number of each row's, and its tokens so far, `(B,)` each."""

    episodes: np.ndarray
    lengths: np.ndarray

    def go_on_from(self, before: NumberedContexts) -> np.ndarray:
        """Bool `(B,)`: rows that begin with what they were."""
        return self.episodes == before.episodes


class PlainContexts(NamedTuple):
    """Contexts that the host has: ids `(B, W)`, right-padded, and lengths `(B,)`."""

    input_ids: np.ndarray
    lengths: np.ndarray

    def go_on_from(self, before: PlainContexts) -> np.ndarray:
        """Bool `(B,)`: rows that begin with what they were."""
        beyond = np.arange(self.input_ids.shape[1]) >= before.lengths[:, None]
        return ((self.input_ids == before.input_ids) | beyond).all(1)


HostContexts = NumberedContexts | PlainContexts
"""What the host knows of contexts: how they have changed takes no look at the device then."""


class SlotCache(Cache):
    """A static key-value cache in which a token's slot is its position in its row.

    Before a forward pass the decoder says what the pass is: `fill(rows)` stores whole contexts from position 0,
    `extend(rows, positions)` stores one token a row and hands back every slot in use.
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
        """The next pass stores contexts that begin at position 0 in these rows (`None`: in all)."""
        self.rows, self.positions = rows, None

    def extend(self, rows: Tensor | None, positions: Tensor, span: int) -> None:
        """The next pass stores one token a row at `positions` `(b,)` and reads the first `span` slots."""
        self.rows, self.positions, self.span = rows, positions, span

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores `(b, heads, Q, head_size)` states; returns what the queries attend to."""
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
        """Copies these rows `(num_rows,)` of another cache of the same model."""
        if not self.keys:
            self.keys = [states.new_empty(self.num_rows, *states.shape[1:]) for states in other.keys]
            self.values = [states.new_empty(self.num_rows, *states.shape[1:]) for states in other.values]
        for mine, states in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            torch.index_select(states, 0, rows, out=mine)

    def spread(self, rows: Tensor, span: int) -> None:
        """Gives every row the first `span` slots of another, `rows` `(num_rows,)`."""
        for states in (*self.keys, *self.values):
            states[:, :, :span] = states[rows, :, :span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused by the models, since they are given position ids; transformers asks for it all the same."""
        return 0


class CachedDecoder:
    """Steps a causal language model over a batch of contexts through a static key-value cache.

    `advance` compares the contexts with those it saw last, on the host where that knows them. A row that grew by one
    token decodes that token; a row that did not change costs nothing; any other row is encoded anew, all such rows in
    one batch. So rows may restart at any time, any observation is legal, and the result equals a full forward pass.
    Weights that change empty the cache, if torch notices: fused optimisers write them unseen, so whoever trains with
    one calls `reset` (`ActorCritic` does).

    Args:
        model: a causal language model of transformers with full or sliding-window attention.
        num_rows: rows of the batch, `B`.
        max_tokens: longest context, `W`.
    """

    def __init__(self, model: Any, num_rows: int, max_tokens: int) -> None:
        self.model, self.num_rows, self.max_tokens = model, num_rows, max_tokens
        self.parameters = list(model.parameters())
        self.reset()

    @property
    def shape(self) -> tuple[int, int]:
        """`(B, W)`."""
        return self.num_rows, self.max_tokens

    @property
    def seen(self) -> tuple[Any, ...]:
        """What `advance` was given last."""
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
        """Forgets all contexts and frees the cache."""
        device = self.model.device
        self.cache = SlotCache(self.num_rows, self.max_tokens)
        self.input_ids = torch.zeros(self.num_rows, self.max_tokens, dtype=torch.long, device=device)
        self.lengths = torch.zeros(self.num_rows, dtype=torch.long, device=device)
        self.slots = torch.arange(self.max_tokens, device=device)
        self.hidden: Tensor | None = None  # (B, d)
        self.host: HostContexts | None = None
        self.longest = 0  # tokens of the longest context that `begin` was given
        self.version = self._weights_version()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(states.nbytes for states in (*self.cache.keys, *self.cache.values))

    @torch.no_grad()
    def advance(self, input_ids: Tensor, lengths: Tensor, host: HostContexts | None = None) -> Tensor:
        """The last hidden state of every context.

        Args:
            input_ids: `(B, W)`, right-padded.
            lengths: `(B,)`, tokens of each context, at least 1.
            host: what the host knows of them.

        Returns:
            `(B, d)`, in the model's dtype; a fresh tensor.

        Raises:
            ValueError: another shape than the decoder was made for, or a context that is empty or too long for the
                model.
        """
        if input_ids.shape != (self.num_rows, self.max_tokens):
            raise ValueError(f"expected input_ids of shape {(self.num_rows, self.max_tokens)}, got {input_ids.shape}")
        if self.outdated:
            self.reset()
        grown, other, sizes = self._changes(input_ids, lengths, host)
        if sizes.min() < 1:
            raise ValueError("a context is empty: begin it with at least one token")
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
        """Rows that have grown by a token, rows that are others than before, and lengths, `(B,)` each on the host."""
        if host is not None and type(host) is type(self.host):
            same, before, now = host.go_on_from(self.host), self.host.lengths, host.lengths  # type: ignore[arg-type]
            longer = same & (now == before + 1)
            return longer, ~longer & ~(same & (now == before)), now
        known = (input_ids == self.input_ids) | (self.slots >= self.lengths[:, None])
        known = known.all(1) & (self.lengths > 0)
        grown = known & (lengths == self.lengths + 1)
        other = ~grown & ~(known & (lengths == self.lengths))
        grown, other, lengths = to_host(grown, other, lengths)  # what a step waits for
        return grown.numpy(), other.numpy(), lengths.numpy()

    def _index(self, rows: np.ndarray) -> Tensor | None:
        """Indices of the rows that are set in a bool array `(B,)`; `None` for all."""
        if rows.all():
            return None
        [index] = to_device(self.slots.device, torch.from_numpy(np.flatnonzero(rows)))
        return index

    # --- for a caller that knows how its contexts grow: no comparison, so no look at the device from the host ---

    @torch.no_grad()
    def begin(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """The last hidden states `(B, d)` of new contexts `(B, W)` in all rows.

        Those of like length are read in one pass, and one that several rows have is read once. The host looks at the
        contexts once.
        """
        sizes, first = _first_alike(input_ids, lengths)
        self.longest = max(sizes)
        kinds = sorted(set(first))
        batches = [[kinds[i] for i in batch] for batch in batches_by_length([sizes[row] for row in kinds], len(kinds))]

        order = [row for batch in batches for row in batch]
        rows, source = to_device(lengths.device, torch.tensor(order), torch.tensor(first))
        for batch, chosen in zip(batches, rows.split([len(batch) for batch in batches]), strict=True):
            width = max(sizes[row] for row in batch)
            self._encode(input_ids, lengths, None if len(batch) == len(sizes) else chosen, width)

        if len(kinds) < len(sizes):
            self.cache.spread(source, self.longest)
            self._store(None, self._states()[source])
        self.input_ids.copy_(input_ids)
        self.lengths.copy_(lengths)
        self.host = None
        return self._states()

    @torch.no_grad()
    def extend(self, tokens: Tensor, span: int) -> Tensor:
        """Appends one token `(B,)` to every row; the last hidden states `(B, d)`. `span`: slots that may be in use."""
        self.input_ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths += 1
        self._decode(self.input_ids, self.lengths, None, span)
        return self._states()

    def take(self, other: CachedDecoder, rows: Tensor) -> None:
        """Goes on with these rows `(B,)` of another decoder of the same model and width."""
        self.cache.take(other.cache, rows)
        self.input_ids.copy_(other.input_ids[rows])
        self.lengths.copy_(other.lengths[rows])

    def _encode(self, input_ids: Tensor, lengths: Tensor, rows: Tensor | None, width: int | None = None) -> None:
        """Whole contexts of some rows in one pass; `width` is the length of the longest, if the host knows it.

        Right padding needs no mask: no real token sees what follows it.
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
        """One new token of some rows, against the slots in use."""
        if rows is not None:
            input_ids, lengths = input_ids[rows], lengths[rows]
        positions = lengths - 1
        tokens = input_ids.gather(1, positions[:, None])
        distance = (positions[:, None] - self.slots[:span])[:, None, None]  # (b, 1, 1, K)
        self.cache.extend(rows, positions, span)
        hidden = self._forward(tokens, positions[:, None], distance >= 0, distance)
        self._store(rows, hidden[:, 0])

    def _forward(self, input_ids: Tensor, positions: Tensor, allowed: Tensor, distance: Tensor) -> Tensor:
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
        assert self.hidden is not None, "a pass has stored some"
        return self.hidden

    def _weights_version(self) -> int:
        """Grows whenever a weight is written in place, as optimisers and `load_state_dict` do."""
        return sum(parameter._version for parameter in self.parameters)


def _first_alike(input_ids: Tensor, lengths: Tensor) -> tuple[list[int], list[int]]:
    """Length of each context `(B, W)`, and the first row that has the same one."""
    host = torch.cat((lengths[:, None], input_ids), dim=1).cpu().numpy()
    sizes: list[int] = host[:, 0].tolist()
    rows: dict[bytes, int] = {}
    first = [rows.setdefault(host[row, : size + 1].tobytes(), row) for row, size in enumerate(sizes)]
    return sizes, first
