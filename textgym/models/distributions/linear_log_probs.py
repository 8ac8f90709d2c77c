"""LinearLogProbs: log-probs and entropies under a linear output embedding, with a hand-written backward pass.

Autograd would save several `(m, V)` tensors for each chunk of tokens and make a `(V, d)` gradient of the embedding for
each chunk. Here a chunk needs two `(m, V)` tensors, and all chunks add to one gradient. If p is the distribution of a
token, H its entropy and a the action, then

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
    """The actions to score, and the distribution to score them under.

    Attributes:
        actions: `(M,)` token ids.
        distribution: Temperature, mask and banned stop tokens of all M states.
        size: Number of tokens in a chunk.
        entropy_gradient: Whether gradients flow through the entropy.
    """

    actions: Tensor
    distribution: TokenDistribution
    size: int
    entropy_gradient: bool = False

    def chunks(self) -> Iterator[slice]:
        """Return the slices of the tokens, one for each chunk."""
        return (slice(start, start + self.size) for start in range(0, len(self.actions), self.size))

    def log_softmax(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        """Return the log-probs `(m, V)` of the next tokens of a chunk, float32."""
        logits = functional.linear(hidden[rows], weight, bias)
        log_probs = self.distribution[rows].log_probs(logits, self.actions[rows])
        return log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)  # 0 * -inf would make the entropy NaN


class LinearLogProbs(torch.autograd.Function):
    """`apply(hidden (M, d), weight (V, d), bias (V,) or None, scoring)`: log-probs and entropies `(M,)`, float32.

    The log-probs of a single chunk are saved for the backward pass; those of several chunks are recomputed there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scoring: Scoring) -> tuple[Tensor, ...]:
        """Return the log-probs of the actions and the entropies, computed chunk by chunk."""
        action_log_probs = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(action_log_probs)
        log_probs = None
        for rows in scoring.chunks():
            log_probs = scoring.log_softmax(hidden, weight, bias, rows)  # (m, V)
            action_log_probs[rows] = log_probs.gather(1, scoring.actions[rows, None])[:, 0]
            entropy[rows] = -log_probs.exp().mul_(log_probs).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, entropy, log_probs if len(hidden) <= scoring.size else None)
        ctx.scoring = scoring
        if not scoring.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return action_log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the hidden states, weight and bias; the last two are summed in float32."""
        hidden, weight, bias, entropy, saved = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        wanted = ctx.needs_input_grad
        gradients = [torch.empty_like(hidden) if wanted[0] else None] + [
            torch.zeros_like(x, dtype=torch.float32) if needed else None
            for x, needed in ((weight, wanted[1]), (bias, wanted[2]))
        ]
        for rows in scoring.chunks():
            log_probs = scoring.log_softmax(hidden, weight, bias, rows) if saved is None else saved
            if scoring.entropy_gradient:
                p = log_probs.exp()  # (m, V)
                grad_logits = -grad_log_probs[rows, None] * p
                # Multiply by p first: where a log-prob is the lowest float, p is 0, and any other order may overflow.
                grad_logits -= (log_probs + entropy[rows, None]).mul_(p).mul_(grad_entropy[rows, None])
            else:
                p = log_probs.exp_() if saved is None else log_probs.exp()
                grad_logits = p.mul_(-grad_log_probs[rows, None])
            grad_logits.scatter_add_(1, scoring.actions[rows, None], grad_log_probs[rows, None])
            if scoring.distribution.temperature != 1.0:
                grad_logits /= scoring.distribution.temperature
            _add_chunk(gradients, grad_logits.to(weight.dtype), hidden, weight, rows)
        return (*gradients, None)


def _add_chunk(
    gradients: list[Tensor | None], grad_logits: Tensor, hidden: Tensor, weight: Tensor, rows: slice
) -> None:
    """Add the gradients of one chunk, in place."""
    grad_hidden, grad_weight, grad_bias = gradients
    if grad_hidden is not None:
        grad_hidden[rows] = grad_logits @ weight
    if grad_weight is not None and grad_logits.dtype == torch.float32:
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    elif grad_weight is not None:
        grad_weight += grad_logits.T @ hidden[rows]
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0, dtype=torch.float32)
