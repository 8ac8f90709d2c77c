"""ResponseGenerator: generate whole responses to a batch of prompts without waiting for the host at every token.

A step decodes the newest token of every row and samples the next one, on tensors with fixed shapes and addresses. On a
GPU it is captured as a CUDA graph, once for each number of rows and of slots in use, and replayed. The host checks only
now and then which rows have ended, and then removes them from the batch.
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
"""Number of logits that one product with the embedding makes on a CPU: 64 MB in float32. This is larger than the chunks
of log-softmax, because each product reads the whole embedding."""
SPAN = 64
"""Captured steps read a multiple of this number of slots, because each number of slots needs its own graph."""
FIRST_LOOK, LOOK_GROWTH = 16, 1.5
"""Step at which the host first checks which rows have ended, and the factor to the step of the next check."""
KEPT_GENERATORS, KEPT_BYTES = 4, 2**30
"""Maximum number of generators that keep their graphs, and maximum total size of their caches in bytes."""


class Responses(NamedTuple):
    """Generated responses.

    Attributes:
        tokens: `(B, T)` int64; positions from `lengths` on are arbitrary, here and in the next two.
        log_probs: `(B, T)` float32.
        values: `(B, T)` float32.
        lengths: `(B,)`, number of tokens with the stop token.
        by_stop: Bool `(B,)`, whether a stop token ended the response.
    """

    tokens: Tensor
    log_probs: Tensor
    values: Tensor
    lengths: Tensor
    by_stop: Tensor


class DecodingBatch:
    """Rows that are decoded together.

    Attributes:
        decoder: Their decoder.
        rows: `(b,)`, their indices in the whole batch.
        alive: Bool `(b,)`, whether they still generate.
        steps: Captured steps by span and `deterministic`; `None` for one that has run once but is not captured yet.
    """

    def __init__(self, policy: Any, num_rows: int, width: int) -> None:
        self.decoder = CachedDecoder(policy.lm, num_rows, width)
        self.rows = torch.arange(num_rows, device=policy.device)
        self.alive = torch.ones(num_rows, dtype=torch.bool, device=policy.device)
        self.steps: dict[tuple[int, bool], Callable[[], object] | None] = {}

    def take(self, others: DecodingBatch, chosen: Tensor) -> None:
        """Copy the rows `chosen` `(b,)` of another batch, and continue from them."""
        self.decoder.take(others.decoder, chosen)
        self.rows.copy_(others.rows[chosen])
        self.alive.copy_(others.alive[chosen])


class ResponseGenerators:
    """The `ResponseGenerator`s of a policy, one for each of the shapes that were used last.

    A generator is used only while the policy's state is the one it was made for, because captured steps depend on it.

    Attributes:
        graphs: Captures the policy's steps if its device can.
    """

    def __init__(self) -> None:
        self.graphs = Graphs()
        self.kept: dict[tuple[Any, ...], tuple[tuple[Any, ...], ResponseGenerator]] = {}  # state and generator by shape

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without generators, because CUDA graphs can be neither copied nor pickled."""
        return (type(self), ())

    @property
    def nbytes(self) -> int:
        """Size of the key-value caches in bytes."""
        return sum(generator.nbytes for _, generator in self.kept.values())

    def get(self, policy: Any, num_rows: int, width: int, max_new_tokens: int, stop: StopRule) -> ResponseGenerator:
        """Return the generator for this shape and for the current state of the policy."""
        captures = can_capture(policy.device) and not self.graphs.reason
        state = state_of(policy) if captures else computing(policy.device)
        shape = (num_rows, width, max_new_tokens, stop)

        known_state, generator = self.kept.pop(shape, (None, None))
        if generator is None or known_state != state:
            generator = ResponseGenerator(policy, *shape, self.graphs if captures else None)
        if not captures:
            self.kept.clear()
        self.kept[shape] = state, generator  # in the order of use: the first one is removed first

        while len(self.kept) > 1 and (len(self.kept) > KEPT_GENERATORS or self.nbytes > KEPT_BYTES):
            del self.kept[next(iter(self.kept))]
        return generator

    def reset(self) -> None:
        """Free the key-value caches, except those of captured steps, because to capture steps again is slow."""
        if any(generator.graphs is None for _, generator in self.kept.values()):
            self.kept.clear()


def can_capture(device: torch.device) -> bool:
    """Return whether steps on a device can be captured as CUDA graphs."""
    return device.type == "cuda"


class ResponseGenerator:
    """Generate responses with a policy; the result is that of `policy.act` called for every token.

    Args:
        policy: An `ActorCritic`. If its critic is a separate model, values are zero.
        num_rows: Number of rows, B.
        width: Maximum length of a prompt and its response together, W.
        max_new_tokens: Maximum length of a response, T.
        stop: Stop tokens and the minimum length of a response.
        graphs: Captures steps. The batch then shrinks only by halves, because each number of rows needs its own graphs.
            `None` captures no steps.
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
        self.stop_tokens = stop_tokens(stop.ids, policy.vocab_size, device)  # kept: captured steps read this address
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.log_probs, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.by_stop = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.noise = torch.zeros(num_rows, 1, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.sizes = {num_rows: DecodingBatch(policy, num_rows, width)}

    @property
    def nbytes(self) -> int:
        """Size of the key-value caches in bytes."""
        return sum(batch.decoder.nbytes for batch in self.sizes.values())

    @torch.no_grad()
    def generate(self, prompts: Tensor, lengths: Tensor, deterministic: bool = False) -> Responses:
        """Return responses to prompts.

        Args:
            prompts: `(B, W)`, right-padded.
            lengths: `(B,)`, number of tokens of each prompt.
            deterministic: Whether to choose the most likely token at every step instead of sampling.

        Raises:
            ValueError: If a prompt is empty, or a prompt and its response are too long for the model.
        """
        batch = self.sizes[self.num_rows]
        for buffer in (self.tokens, self.log_probs, self.values, self.lengths, self.by_stop, self.step):
            buffer.zero_()
        batch.alive.fill_(True)
        self._refill_noise(deterministic)
        hidden = batch.decoder.begin(prompts, lengths)
        check_positions(self.policy.lm.config, batch.decoder.longest + self.max_new_tokens, "a prompt and its response")
        self._sample(batch, hidden, deterministic)
        self._generate_rest(batch, batch.decoder.longest, deterministic)
        return Responses(*(x.clone() for x in (self.tokens, self.log_probs, self.values, self.lengths, self.by_stop)))

    def _generate_rest(self, batch: DecodingBatch, longest: int, deterministic: bool) -> None:
        """Generate all tokens after the first; `longest` is the length of the longest prompt."""
        next_look = 1 if self.graphs is None else FIRST_LOOK
        for count in range(1, self.max_new_tokens):
            if count >= next_look:
                alive = int(batch.alive.sum())  # the only place where the host waits for the device
                if not alive:
                    break
                batch = self._without_ended_rows(batch, alive)
                next_look = count + 1 if self.graphs is None else int(LOOK_GROWTH * count)
            self._refill_noise(deterministic)
            with phase("decode"):  # one phase for each token, so that a trace can be limited to the first ones
                self._advance(batch, longest + count, deterministic)

    def _refill_noise(self, deterministic: bool) -> None:
        """Sample a random number for every row, also for ended ones, so that a row's end does not change the others."""
        if not deterministic:
            self.noise.uniform_(generator=self.policy.generator)

    def _without_ended_rows(self, batch: DecodingBatch, alive: int) -> DecodingBatch:
        """Return a batch without the ended rows if they are many: to copy the others takes the time of one token."""
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
        """Generate one more token in every row of the batch, by a captured step if possible."""
        if self.graphs is None:
            return self._step(batch, span, deterministic)
        span = min(-(-span // SPAN) * SPAN, self.width)
        kind = (span, deterministic)

        if kind not in batch.steps:  # the first step runs uncaptured: libraries initialise, which a capture forbids
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
                batch.decoder.hidden = None  # it is in the graphs' shared memory pool, which the next graph overwrites
            batch.steps[kind] = replay
        replay()
        return None

    def _give_up(self, reason: str) -> None:
        """Capture no more steps, in this generator and in the others of the policy, and warn."""
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
        """Decode the newest tokens and sample the next ones, without reading values of the device on the host."""
        newest = self.tokens[batch.rows, self.step - 1]
        self._sample(batch, batch.decoder.extend(newest, span), deterministic)

    def _sample(self, batch: DecodingBatch, hidden: Tensor, deterministic: bool) -> None:
        """Sample a token in every row of the batch from its last hidden state `(b, d)`."""
        policy, place = self.policy, (batch.rows, self.step)
        banned = self.stop.applies(self.step)  # (1,), on the device: a replay cannot read the step from the host
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
        if banned is not None:  # if every token is a stop token, one is sampled although stop tokens are banned
            stops = stops & ~banned
        self.by_stop[batch.rows] = self.by_stop[batch.rows] | stops
        batch.alive &= ~stops
        self.step += 1

    def _logits(self, hidden: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Yield logits `(m, V)` of chunks of rows, and the slice of each chunk, to save memory if V is large."""
        chunk = self.chunk
        product = max(chunk, LOGIT_ELEMENTS // self.policy.vocab_size)  # rows in one product with the embedding
        for start in range(0, len(hidden), product):
            logits = self.policy.head(hidden[start : start + product])
            for first in range(0, len(logits), chunk):
                part = logits[first : first + chunk]
                yield part, slice(start + first, start + first + len(part))

    def _choose(self, log_probs: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a token `(m,)` for each row of log-probs `(m, V)`, sampled or the most likely, and its log-prob."""
        token = log_probs.argmax(-1) if noise is None else sample(log_probs.exp(), noise)
        return token, log_probs.gather(1, token[:, None])[:, 0]
