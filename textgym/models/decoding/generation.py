"""ResponseGenerator: whole responses to a batch of prompts, token by token without the host in between.

A step decodes the newest token of every row and samples the next one, on tensors of fixed shapes at fixed places. On a
GPU it is captured as a CUDA graph, once for each number of rows and of slots in use, and replayed. The host asks only
now and then whether rows have ended, and lets go of those that have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textgym.models.architectures.positions import check_positions
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.decoding.cuda_graphs import Graphs, HostAccess, NotCapturedError, computing, state_of
from textgym.models.decoding.sampling import sample
from textgym.models.decoding.stop_tokens import stop_tokens
from textgym.models.distributions.log_probs import StopRule, chunk_tokens
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.models.machine.profiled_phases import phase

LOGIT_ELEMENTS = 2**24
"""Logits held at once on a CPU: 64 MB in float32. More than are worked on at once, since to make them reads the
embedding."""
SPAN = 64
"""A captured step reads slots in multiples of this, since each number of them is a graph of its own."""
FIRST_LOOK, LOOK_GROWTH = 16, 1.5
"""Steps after which the host first looks whether rows have ended, and by what the number grows until it looks again."""
KEPT_GENERATORS, KEPT_BYTES = 4, 2**30
"""How many shapes keep a generator that captures, and how many bytes the caches of all together may have."""


class Responses(NamedTuple):
    """What was generated: `tokens` int64, `log_probs`, `values` float32, `(B, T)` each; any number from `lengths` on.

    `lengths` `(B,)` counts a stop token; `by_stop` bool `(B,)` says whether there is one.
    """

    tokens: Tensor
    log_probs: Tensor
    values: Tensor
    lengths: Tensor
    by_stop: Tensor


class DecodingBatch:
    """The rows that are decoded together: `rows` `(b,)`, which ones, `alive` bool `(b,)`, and their decoder."""

    def __init__(self, policy: Any, num_rows: int, width: int) -> None:
        self.decoder = CachedDecoder(policy.lm, num_rows, width)
        self.rows = torch.arange(num_rows, device=policy.device)
        self.alive = torch.ones(num_rows, dtype=torch.bool, device=policy.device)
        self.steps: dict[tuple[int, bool], Callable[[], object] | None] = {}  # captured, by span and `deterministic`

    def take(self, others: DecodingBatch, chosen: Tensor) -> None:
        """Goes on with some of the others' rows, `(b,)` indices."""
        self.decoder.take(others.decoder, chosen)
        self.rows.copy_(others.rows[chosen])
        self.alive.copy_(others.alive[chosen])


class ResponseGenerators:
    """The `ResponseGenerator`s of a policy, one for each shape that it was asked for lately.

    A generator belongs to the state that the policy was in. When that has changed, what was captured is no longer true.

    Attributes:
        graphs: captures the policy's steps, where its device can.
    """

    def __init__(self) -> None:
        self.graphs = Graphs()
        self.kept: dict[tuple[Any, ...], tuple[tuple[Any, ...], ResponseGenerator]] = {}  # state and generator by shape

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the policy, or what is unpickled, captures its own: graphs can be neither copied nor pickled."""
        return (type(self), ())

    @property
    def nbytes(self) -> int:
        """Bytes of the key-value caches."""
        return sum(generator.nbytes for _, generator in self.kept.values())

    def get(self, policy: Any, num_rows: int, width: int, max_new_tokens: int, stop: StopRule) -> ResponseGenerator:
        """The generator for this shape, and for the policy as it is now."""
        captures = can_capture(policy.device) and not self.graphs.reason
        state = state_of(policy) if captures else computing(policy.device)
        shape = (num_rows, width, max_new_tokens, stop)

        known_state, generator = self.kept.pop(shape, (None, None))
        if generator is None or known_state != state:
            generator = ResponseGenerator(policy, *shape, self.graphs if captures else None)
        if not captures:
            self.kept.clear()
        self.kept[shape] = state, generator  # the last one is the one used last

        while len(self.kept) > 1 and (len(self.kept) > KEPT_GENERATORS or self.nbytes > KEPT_BYTES):
            del self.kept[next(iter(self.kept))]
        return generator

    def reset(self) -> None:
        """Frees the key-value caches, except for those of captured steps: to capture anew costs more than memory."""
        if any(generator.graphs is None for _, generator in self.kept.values()):
            self.kept.clear()


def can_capture(device: torch.device) -> bool:
    """Whether steps on a device can be captured."""
    return device.type == "cuda"


class ResponseGenerator:
    """Generates with a policy, as if `policy.act` were asked for every token in turn.

    Args:
        policy: an `ActorCritic`; a critic of its own is not asked, and values are zero.
        num_rows: B.
        width: longest prompt and response together, W.
        max_new_tokens: T.
        stop: what ends a response, and the shortest one.
        graphs: captures steps, for which rows are let go by halves; `None` runs every step as it is.
    """

    def __init__(
        self,
        policy: Any,
        num_rows: int,
        width: int,
        max_new_tokens: int,
        stop: StopRule,
        graphs: Graphs | None = None,
    ) -> None:
        self.policy, self.num_rows, self.width = policy, num_rows, width
        self.max_new_tokens, self.stop, self.graphs = max_new_tokens, stop, graphs
        self.chunk = chunk_tokens(policy.vocab_size, policy.device)
        device, shape = policy.device, (num_rows, max_new_tokens)
        self.stop_tokens = stop_tokens(stop.ids, policy.vocab_size, device)  # captured steps read them where they are
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.log_probs, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.by_stop = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.noise = torch.zeros(num_rows, 1, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.sizes = {num_rows: DecodingBatch(policy, num_rows, width)}

    @property
    def nbytes(self) -> int:
        """Bytes of the key-value caches."""
        return sum(batch.decoder.nbytes for batch in self.sizes.values())

    @torch.no_grad()
    def generate(self, prompts: Tensor, lengths: Tensor, deterministic: bool = False) -> Responses:
        """Responses to right-padded prompts `(B, W)` of these lengths `(B,)`."""
        batch = self.sizes[self.num_rows]
        for buffer in (self.tokens, self.log_probs, self.values, self.lengths, self.by_stop, self.step):
            buffer.zero_()
        batch.alive.fill_(True)
        self._roll(deterministic)
        hidden = batch.decoder.begin(prompts, lengths)
        check_positions(self.policy.lm.config, batch.decoder.longest + self.max_new_tokens, "a prompt and its response")
        self._sample(batch, hidden, deterministic)
        self._go_on(batch, batch.decoder.longest, deterministic)
        return Responses(*(x.clone() for x in (self.tokens, self.log_probs, self.values, self.lengths, self.by_stop)))

    def _go_on(self, batch: DecodingBatch, longest: int, deterministic: bool) -> None:
        """All tokens but the first."""
        next_look = 1 if self.graphs is None else FIRST_LOOK
        for count in range(1, self.max_new_tokens):
            if count >= next_look:
                alive = int(batch.alive.sum())  # the host waits for the device here, and nowhere else
                if not alive:
                    break
                batch = self._narrowed(batch, alive)
                next_look = count + 1 if self.graphs is None else int(LOOK_GROWTH * count)
            self._roll(deterministic)
            with phase("decode"):  # token by token, so that a trace can hold the first ones alone
                self._advance(batch, longest + count, deterministic)

    def _roll(self, deterministic: bool) -> None:
        """A random number for every row, under way or not, so that no row's end changes what others sample."""
        if not deterministic:
            self.noise.uniform_(generator=self.policy.generator)

    def _narrowed(self, batch: DecodingBatch, alive: int) -> DecodingBatch:
        """The batch without the rows that have ended, if those are many: to copy the others costs about one token."""
        size = len(batch.rows)
        if self.graphs is not None:
            while size % 2 == 0 and alive <= size // 2:
                size //= 2
        elif alive <= 0.75 * size:
            size = alive
        if size == len(batch.rows):
            return batch
        fewer = self.sizes.get(size) or DecodingBatch(self.policy, size, self.width)
        if self.graphs is not None:
            self.sizes[size] = fewer
        fewer.take(batch, batch.alive.int().argsort(descending=True, stable=True)[:size])
        return fewer

    def _advance(self, batch: DecodingBatch, span: int, deterministic: bool) -> None:
        """One token more in every row of the batch."""
        if self.graphs is None:
            return self._step(batch, span, deterministic)
        span = min(-(-span // SPAN) * SPAN, self.width)
        kind = (span, deterministic)

        if kind not in batch.steps:  # the first one warms up the libraries, which may not happen in a capture
            batch.steps[kind] = None
            with HostAccess() as access:
                self._step(batch, span, deterministic)
            if access.operation:
                self._give_up(f"{access.operation} makes the host wait for the device")
            return None

        replay = batch.steps[kind]
        if replay is None:
            try:
                replay = self.graphs.capture(lambda: self._step(batch, span, deterministic))
            except NotCapturedError as error:
                self._give_up(str(error))
                return self._step(batch, span, deterministic)
            finally:
                batch.decoder.hidden = None  # it is in the memory that all graphs share
            batch.steps[kind] = replay
        replay()
        return None

    def _give_up(self, reason: str) -> None:
        """Runs every step as it is from now on, in this generator and in the others of the policy."""
        assert self.graphs is not None
        self.graphs.reason = reason
        self.graphs = None
        self.sizes = {self.num_rows: self.sizes[self.num_rows]}
        for batch in self.sizes.values():
            batch.steps.clear()
        warnings.warn(
            f"steps of {type(self.policy.lm).__name__} cannot be captured as CUDA graphs: {reason}. Responses are the "
            "same, and small models generate them more slowly",
            stacklevel=2,
        )

    def _step(self, batch: DecodingBatch, span: int, deterministic: bool) -> None:
        """Decodes the newest tokens and samples the next. Nothing in here asks the device for a value."""
        newest = self.tokens[batch.rows, self.step - 1]
        self._sample(batch, batch.decoder.extend(newest, span), deterministic)

    def _sample(self, batch: DecodingBatch, hidden: Tensor, deterministic: bool) -> None:
        """Samples a token in every row of the batch from its last hidden state `(b, d)`."""
        policy, place = self.policy, (batch.rows, self.step)
        banned = self.stop.applies(self.step)  # (1,), a tensor even so: the host does not know the step of a replay
        distribution = TokenDistribution(policy.temperature, banned=banned, stop_ids=self.stop.ids)
        noise = None if deterministic else self.noise[batch.rows]
        sampled = [
            self._choose(distribution.log_probs(logits), None if noise is None else noise[rows])
            for logits, rows in self._logits(hidden)
        ]
        token, log_prob = (torch.cat(parts) for parts in zip(*sampled, strict=True))
        self.tokens[place], self.log_probs[place] = token, log_prob
        if policy.critic is None:
            self.values[place] = policy.value_head(hidden.float())[:, 0]
        self.lengths.index_add_(0, batch.rows, batch.alive.long())
        stops = batch.alive & self.stop_tokens.table[token]
        if banned is not None:  # by a minimum, and every token may be a stop token
            stops = stops & ~banned
        self.by_stop[batch.rows] = self.by_stop[batch.rows] | stops
        batch.alive &= ~stops
        self.step += 1

    def _logits(self, hidden: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Logits `(m, V)` of the head, of some rows after others, and which: a large V is not worked on at once."""
        few = self.chunk
        many = max(few, LOGIT_ELEMENTS // self.policy.vocab_size)
        for start in range(0, len(hidden), many):
            logits = self.policy.head(hidden[start : start + many])
            for first in range(0, len(logits), few):
                part = logits[first : first + few]
                yield part, slice(start + first, start + first + len(part))

    def _choose(self, log_probs: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token for each row of log-probs `(m, V)`: the one its random number names, or the likeliest; its own."""
        token = log_probs.argmax(-1) if noise is None else sample(log_probs.exp(), noise)
        return token, log_probs.gather(1, token[:, None])[:, 0]
