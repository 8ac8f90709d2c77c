"""ResponseWriter: whole responses to a batch of prompts, drawn token by token without the host in between.

A step decodes the newest token of every row and draws the next one, on tensors of fixed shapes at fixed places. On a
GPU it is captured as a CUDA graph, once for each number of rows and of slots in use, and replayed. The host asks only
now and then whether rows have ended, and lets go of those that have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textgym.models.decoding import CachedDecoder
from textgym.models.flops import captured, replayed
from textgym.models.log_probs import CHUNK_ELEMENTS, StopRule
from textgym.models.phases import phase

DRAW_ELEMENTS = 2**24
"""Logits held at once: 64 MB in float32. More than are worked on at once, since to make them reads the embedding."""
SPAN = 64
"""A captured step reads slots in multiples of this, since each number of them is a graph of its own."""


class Responses(NamedTuple):
    """What was written: `tokens` int64, `log_probs` and `values` float32, `(B, T)` each; any number from `lengths` on.

    `lengths` `(B,)` counts a stop token; `by_stop` bool `(B,)` says whether there is one.
    """

    tokens: Tensor
    log_probs: Tensor
    values: Tensor
    lengths: Tensor
    by_stop: Tensor


class Lanes:
    """The rows that are decoded together: `rows` `(b,)`, which ones, `alive` bool `(b,)`, and their decoder."""

    def __init__(self, policy: Any, num_rows: int, width: int) -> None:
        self.decoder = CachedDecoder(policy.lm, num_rows, width)
        self.rows = torch.arange(num_rows, device=policy.device)
        self.alive = torch.ones(num_rows, dtype=torch.bool, device=policy.device)
        self.steps: dict[int, Callable[[], object] | None] = {}  # captured, by the slots that they read

    def take(self, others: Lanes, chosen: Tensor) -> None:
        """Goes on with some of the others' rows, `(b,)` indices."""
        self.decoder.take(others.decoder, chosen)
        self.rows.copy_(others.rows[chosen])
        self.alive.copy_(others.alive[chosen])


class ResponseWriter:
    """Writes with a policy, as if `policy.act` were asked for every token in turn.

    Args:
        policy: an `ActorCritic`; a critic of its own is not asked, and values are zero.
        num_rows: B.
        width: longest prompt and response together, W.
        max_new_tokens: T.
        stop: what ends a response, and the shortest one.
        captures: whether steps are captured and replayed, for which rows are let go by halves.
    """

    def __init__(
        self, policy: Any, num_rows: int, width: int, max_new_tokens: int, stop: StopRule, captures: bool
    ) -> None:
        self.shape = (num_rows, width, max_new_tokens, stop)
        self.policy, self.num_rows, self.width = policy, num_rows, width
        self.max_new_tokens, self.stop, self.captures = max_new_tokens, stop, captures
        self.look_every = 8 if captures else 1
        device, shape = policy.device, (num_rows, max_new_tokens)
        self.is_stop = torch.zeros(policy.vocab_size, dtype=torch.bool, device=device)
        self.is_stop[[token for token in stop.ids if token < policy.vocab_size]] = True  # the others are never drawn
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.log_probs, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.by_stop = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.noise = torch.zeros(num_rows, 1, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.sizes = {num_rows: Lanes(policy, num_rows, width)}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the policy, or what is unpickled, captures its own: graphs can be neither copied nor pickled."""
        return (type(None), ())

    @property
    def nbytes(self) -> int:
        """Bytes of the key-value caches."""
        return sum(lanes.decoder.nbytes for lanes in self.sizes.values())

    @torch.no_grad()
    def write(self, prompts: Tensor, lengths: Tensor, deterministic: bool = False) -> Responses:
        """Responses to right-padded prompts `(B, W)` of these lengths `(B,)`."""
        lanes, longest = self.sizes[self.num_rows], int(lengths.max())
        for buffer in (self.tokens, self.log_probs, self.values, self.lengths, self.by_stop, self.step):
            buffer.zero_()
        lanes.alive.fill_(True)
        self._roll(deterministic)
        self._draw(lanes, lanes.decoder.begin(prompts, lengths), deterministic)
        for count in range(1, self.max_new_tokens):
            if count % self.look_every == 0:
                alive = int(lanes.alive.sum())
                if not alive:
                    break
                lanes = self._narrowed(lanes, alive)
            self._roll(deterministic)
            with phase("decode"):  # token by token, so that a trace can hold the first ones alone
                self._advance(lanes, longest + count, deterministic)
        return Responses(*(x.clone() for x in (self.tokens, self.log_probs, self.values, self.lengths, self.by_stop)))

    def _roll(self, deterministic: bool) -> None:
        """A random number for every row, under way or not, so that no row's end changes what others draw."""
        if not deterministic:
            self.noise.uniform_(generator=self.policy.generator)

    def _narrowed(self, lanes: Lanes, alive: int) -> Lanes:
        """Lanes without the rows that have ended, if those are many: to copy the others costs about one token."""
        size = len(lanes.rows)
        if self.captures:
            while size % 2 == 0 and alive <= size // 2:
                size //= 2
        elif alive <= 0.75 * size:
            size = alive
        if size == len(lanes.rows):
            return lanes
        fewer = self.sizes.get(size) or Lanes(self.policy, size, self.width)
        if self.captures:
            self.sizes[size] = fewer
        fewer.take(lanes, lanes.alive.int().argsort(descending=True, stable=True)[:size])
        return fewer

    def _advance(self, lanes: Lanes, span: int, deterministic: bool) -> None:
        """One token more in every lane."""
        if not self.captures or deterministic:
            return self._step(lanes, span, deterministic)
        span = min(-(-span // SPAN) * SPAN, self.width)
        if span not in lanes.steps:  # the first one warms up the libraries, which may not happen in a capture
            lanes.steps[span] = None
            return self._step(lanes, span, False)
        replay = lanes.steps[span] = lanes.steps[span] or capture(lambda: self._step(lanes, span, False))
        replay()

    def _step(self, lanes: Lanes, span: int, deterministic: bool) -> None:
        """Decodes the newest tokens and draws the next. Nothing in here asks the device for a value."""
        newest = self.tokens[lanes.rows, self.step - 1]
        self._draw(lanes, lanes.decoder.extend(newest, span), deterministic)

    def _draw(self, lanes: Lanes, hidden: Tensor, deterministic: bool) -> None:
        """Draws a token in every lane from its last hidden state `(b, d)`."""
        policy, place = self.policy, (lanes.rows, self.step)
        may_stop = self.step >= self.stop.min_new_tokens
        noise = None if deterministic else self.noise[lanes.rows]
        drawn = [
            self._choose(logits, None if noise is None else noise[rows], may_stop)
            for logits, rows in self._logits(hidden)
        ]
        token, log_prob = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        self.tokens[place], self.log_probs[place] = token, log_prob
        if policy.critic is None:
            self.values[place] = policy.value_head(hidden.float())[:, 0]
        self.lengths.index_add_(0, lanes.rows, lanes.alive.long())
        stops = lanes.alive & self.is_stop[token] & may_stop
        self.by_stop[lanes.rows] = self.by_stop[lanes.rows] | stops
        lanes.alive &= ~stops
        self.step += 1

    def _logits(self, hidden: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Logits `(m, V)` of some rows after others, and which: with a large V not all are worked on at once."""
        many, few = (max(1, size // self.policy.vocab_size) for size in (DRAW_ELEMENTS, CHUNK_ELEMENTS))
        for start in range(0, len(hidden), many):
            logits = self.policy.head_logits(hidden[start : start + many])
            for first in range(0, len(logits), few):
                part = logits[first : first + few]
                yield part, slice(start + first, start + first + len(part))

    def _choose(self, logits: Tensor, noise: Tensor | None, may_stop: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row of logits `(m, V)`: the one its random number names, or the likeliest; its log-prob."""
        if self.stop.min_new_tokens:
            logits = logits.masked_fill(self.is_stop & ~may_stop, torch.finfo(logits.dtype).min)
        log_probs = logits.log_softmax(-1)
        token = log_probs.argmax(-1) if noise is None else self.policy.invert(log_probs.exp(), noise)
        return token, log_probs.gather(1, token[:, None])[:, 0]


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """A step as a CUDA graph: what replays it, on the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with captured() as operations, torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()
        replayed(operations)

    return replay
