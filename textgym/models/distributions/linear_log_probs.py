"""LinearLogProbs: log-probs and entropies under a linear output embedding, with a backward pass of its own.

Autograd would keep several `(m, V)` tensors for each chunk of tokens, and make a `(V, d)` gradient of the embedding for
each of them. Here a chunk needs two `(m, V)` tensors, and all chunks add to one gradient. With p the distribution of a
token, H its entropy and a the action,

    d log p_a / d logit_i = [i = a] - p_i        d H / d logit_i = -p_i (log p_i + H)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from textgym.models.distributions.token_distribution import TokenDistribution


@dataclass(frozen=True)
class Scoring:
    """What is scored, and under which distribution.

    Attributes:
        actions: `(M,)` token ids.
        distribution: temperature, mask and banned stop tokens, of all M states.
        size: tokens of a chunk.
        entropy_gradient: whether the entropy is differentiated.
    """

    actions: Tensor
    distribution: TokenDistribution
    size: int
    entropy_gradient: bool = False

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens."""
        return (slice(start, start + self.size) for start in range(0, len(self.actions), self.size))

    def log_softmax(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        """Return the log-probs `(m, V)` of the next tokens of a chunk, float32."""
        logits = functional.linear(hidden[rows], weight, bias)
        log_probs = self.distribution[rows].log_probs(logits, self.actions[rows])
        return log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)  # 0 times -inf would make an entropy NaN


class LinearLogProbs(torch.autograd.Function):
    """`apply(hidden (M, d), weight (V, d), bias (V,) or None, scoring)`: log-probs and entropies `(M,)`, float32.

    The logits of a single chunk are kept for the backward pass, those of several are made again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scoring: Scoring) -> tuple[Tensor, ...]:
        """Chunk by chunk."""
        chosen = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(chosen)
        log_probs = None
        for rows in scoring.chunks():
            log_probs = scoring.log_softmax(hidden, weight, bias, rows)  # (m, V)
            chosen[rows] = log_probs.gather(1, scoring.actions[rows, None])[:, 0]
            entropy[rows] = -log_probs.exp().mul_(log_probs).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, entropy, log_probs if len(hidden) <= scoring.size else None)
        ctx.scoring = scoring
        if not scoring.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chosen: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Chunk by chunk, into one gradient of the weights, which is summed in float32."""
        hidden, weight, bias, entropy, kept = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        wanted = ctx.needs_input_grad
        gradients = [torch.empty_like(hidden) if wanted[0] else None] + [
            torch.zeros_like(x, dtype=torch.float32) if needed else None
            for x, needed in ((weight, wanted[1]), (bias, wanted[2]))
        ]
        for rows in scoring.chunks():
            log_probs = scoring.log_softmax(hidden, weight, bias, rows) if kept is None else kept
            if scoring.entropy_gradient:  # times p first, since it is 0 where a log-prob is the lowest float
                p = log_probs.exp()  # (m, V)
                of_logits = -of_chosen[rows, None] * p
                of_logits -= (log_probs + entropy[rows, None]).mul_(p).mul_(of_entropy[rows, None])
            else:
                p = log_probs.exp_() if kept is None else log_probs.exp()
                of_logits = p.mul_(-of_chosen[rows, None])
            of_logits.scatter_add_(1, scoring.actions[rows, None], of_chosen[rows, None])
            if scoring.distribution.temperature != 1.0:
                of_logits /= scoring.distribution.temperature
            _add_chunk(gradients, of_logits.to(weight.dtype), hidden, weight, rows)
        return (*gradients, None)


def _add_chunk(gradients: list[Tensor | None], of_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[rows] = of_logits @ weight
    if of_weight is not None and of_logits.dtype == torch.float32:
        of_weight.addmm_(of_logits.T, hidden[rows])
    elif of_weight is not None:
        of_weight += of_logits.T @ hidden[rows]
    if of_bias is not None:
        of_bias += of_logits.sum(0, dtype=torch.float32)
