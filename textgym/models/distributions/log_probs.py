"""Token log-probs and entropies from hidden states, without an (N, T, V) tensor in memory.

Logits are computed for one chunk of tokens at a time. If gradients flow through several chunks, the logits are
recomputed in the backward pass. Log-softmax is in float32 for every dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textgym.models.decoding.stop_tokens import stop_tokens
from textgym.models.distributions.linear_log_probs import LinearLogProbs, Scoring
from textgym.models.distributions.token_distribution import TokenDistribution

CHUNK_ELEMENTS = 2**22
"""Number of logits in a chunk on a CPU: 16 MB in float32, because larger chunks do not fit its cache."""
CUDA_CHUNK_ELEMENTS = 2**27
"""Maximum number of logits in a chunk on CUDA: 512 MB in float32, or 880 tokens of a vocabulary of 152,000. Each chunk
reads the whole embedding, which takes less time than the arithmetic if a chunk has a few hundred tokens."""
CUDA_BYTES = 64
"""Bytes of free memory for each logit of a chunk on CUDA: 16 tensors of the chunk's size in float32."""

Head = Callable[[Tensor], Tensor]
PLAIN = TokenDistribution()
"""The softmax of the logits: temperature 1, no mask."""


@dataclass(frozen=True)
class StopRule:
    """The tokens that end a response, and the minimum length of a response.

    Attributes:
        ids: Stop token ids.
        min_new_tokens: Stop ids have probability 0 for this number of tokens from the start of a response, both in
            sampling and in scoring; the probabilities of the other tokens are renormalised.
    """

    ids: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def with_ids(self, ids: Sequence[int]) -> StopRule:
        """Return the rule with further stop tokens."""
        return replace(self, ids=tuple(sorted({*self.ids, *ids})))

    def applies(self, step: Tensor) -> Tensor | None:
        """Return whether stop ids are banned at each step; `None` if they are never banned.

        Args:
            step: Index of each response token, of any shape; the result has this shape.
        """
        return step < self.min_new_tokens if self.min_new_tokens and self.ids else None

    def allowed(self, step: Tensor, vocab_size: int) -> Tensor:
        """Return bool `(M, V)`: the tokens that are allowed as the response tokens with indices `step` `(M,)`."""
        banned = self.applies(step)
        if banned is None:
            return torch.ones(len(step), vocab_size, dtype=torch.bool, device=step.device)
        return ~(banned[:, None] & stop_tokens(self.ids, vocab_size, step.device).table)


def token_log_probs(
    hidden: Tensor,
    head: Head,
    actions: Tensor,
    vocab_size: int,
    distribution: TokenDistribution = PLAIN,
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each action, and the entropy of the distribution it was sampled from.

    Args:
        hidden: `(M, d)` last hidden states before each action.
        head: The output embedding, `(m, d) -> (m, V)`.
        actions: `(M,)` token ids.
        vocab_size: V, which determines the size of chunks.
        distribution: Temperature, mask and banned stop tokens; the same as in sampling, or the ratio of new to old
            probabilities does not start at 1.
        entropy_gradient: Whether gradients flow through the entropy; without them it is only a metric.

    Returns:
        Log-probs `(M,)` and entropies `(M,)` in nats, float32.
    """
    if type(head) is nn.Linear:  # not a subclass, such as a sharded or a LoRA one: its forward pass is different
        size = chunk_tokens(vocab_size, hidden.device)
        scoring = Scoring(actions, distribution, size, entropy_gradient)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weights = [None if x is None else x.to(dtype) for x in (head.weight, head.bias)]
        with torch.autocast(device, enabled=False):
            return LinearLogProbs.apply(hidden.to(dtype), *weights, scoring)  # type: ignore[no-untyped-call]

    def score(hidden: Tensor, actions: Tensor, banned: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        chunk = replace(distribution, banned=banned, allowed=allowed)
        logits = chunk.logits(head(hidden), actions)
        normaliser = logits.logsumexp(-1)
        log_prob = logits.gather(1, actions[:, None])[:, 0] - normaliser
        source, total = (logits, normaliser) if entropy_gradient else (logits.detach(), normaliser.detach())
        expected = (source - total[:, None]).exp().mul(source).sum(-1)
        return log_prob, total - expected

    log_probs, entropies = in_chunks(score, vocab_size, hidden, actions, distribution.banned, distribution.allowed)
    return log_probs, entropies


def full_kl(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor,
    reference_head: Head,
    vocab_size: int,
    distribution: TokenDistribution = PLAIN,
) -> Tensor:
    """Return the exact KL(pi, pi_ref) of every next-token distribution, `(M,)` nats: the sum over the vocabulary.

    Temperature and banned stop tokens apply to both distributions. The mask of `distribution` is ignored.
    """

    def score(hidden: Tensor, reference_hidden: Tensor, banned: Tensor | None) -> tuple[Tensor]:
        chunk = replace(distribution, banned=banned)
        log_p = chunk.log_probs(head(hidden))
        log_q = chunk.log_probs(reference_head(reference_hidden))
        return ((log_p.exp() * (log_p - log_q)).sum(-1),)

    return in_chunks(score, vocab_size, hidden, reference_hidden, distribution.banned)[0]


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Return the number of tokens in a chunk of logits `(m, V)`.

    On CUDA it depends on the free memory. The number of logits is rounded down to a power of two, so that small changes
    of the free memory do not change the chunks, and with them the rounding of sums.
    """
    elements = CHUNK_ELEMENTS
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fitting = 2 ** ((free + cached) // CUDA_BYTES).bit_length() // 2
        elements = max(CHUNK_ELEMENTS, min(fitting, CUDA_CHUNK_ELEMENTS))
    return max(1, elements // vocab_size)


def in_chunks(score: Callable[..., tuple[Tensor, ...]], vocab_size: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Apply `score` to chunks of `(M, ...)` inputs; if gradients flow, the backward pass recomputes each chunk.

    Gradient checkpointing: Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    first = inputs[0]
    assert first is not None
    size, total = chunk_tokens(vocab_size, first.device), first.shape[0]
    if total <= size:
        return score(*inputs)
    parts = []
    for start in range(0, total, size):
        slices = [x if x is None else x[start : start + size] for x in inputs]
        recompute = torch.is_grad_enabled()
        parts.append(checkpoint(score, *slices, use_reentrant=False) if recompute else score(*slices))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
