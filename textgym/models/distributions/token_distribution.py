"""TokenDistribution: the distribution over the next token, as a function of logits.

All code that samples or scores tokens uses it: stepping, generation, packed passes, the reference, SB3 policies,
Q-functions. So all log-probs are of the same distribution, and the ratio of new to old probabilities starts at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from textgym.models.decoding.stop_tokens import stop_tokens


@dataclass(frozen=True)
class TokenDistribution:
    """The distribution softmax(logits / temperature) over the allowed next tokens, in each of m states.

    It is computed in float32 for every dtype of the model, because bfloat16 has only 8 bits of precision.

    >>> TokenDistribution(0.5).log_probs(torch.tensor([[0.0, 1.0]])).exp()
    tensor([[0.1192, 0.8808]])
    >>> masked = TokenDistribution(banned=torch.tensor([True, False]), stop_ids=(0,))
    >>> masked.log_probs(torch.zeros(2, 2)).exp()
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])

    Attributes:
        temperature: Divisor of the logits.
        allowed: Bool `(m, V)`, the tokens that the action mask allows; `None` allows all.
        banned: Bool `(m,)`, or `(1,)` for all states: whether `stop_ids` are forbidden; `None` never forbids them.
        stop_ids: Stop token ids.
    """

    temperature: float = 1.0
    allowed: Tensor | None = None
    banned: Tensor | None = None
    stop_ids: tuple[int, ...] = ()

    def __getitem__(self, rows: slice) -> TokenDistribution:
        """Return the distribution in some of the states."""
        allowed = None if self.allowed is None else self.allowed[rows]
        banned = None if self.banned is None else self.banned[rows]
        return TokenDistribution(self.temperature, allowed, banned, self.stop_ids)

    def logits(self, logits: Tensor, actions: Tensor | None = None) -> Tensor:
        """Return the logits `(m, V)` of the distribution in float32; forbidden tokens have the lowest float.

        It is the lowest float and not -inf, because the product of -inf with a probability of 0 is NaN.

        Args:
            logits: `(m, V)`, the output of the head. They are overwritten, unless gradients flow through them.
            actions: `(m,)`, the tokens to score. If an action is forbidden, its state's distribution leaves out the
                mask or ban that forbids it, so that its log-prob is finite.
        """
        logits = logits.float()
        bans = self.banned is not None and bool(self.stop_ids)
        if self.temperature == 1.0 and self.allowed is None and not bans:
            return logits  # nothing to change: saves a copy of a large tensor
        if logits.requires_grad:
            logits = logits.clone()

        if self.temperature != 1.0:
            logits /= self.temperature

        lowest = torch.finfo(logits.dtype).min
        if self.banned is not None and bans:
            banned = self.banned
            is_stop = stop_tokens(self.stop_ids, logits.shape[1], logits.device).table  # (V,)
            if actions is not None:
                banned = banned & ~is_stop[actions]
            logits.masked_fill_(banned[:, None] & is_stop, lowest)

        if self.allowed is not None:
            forbidden = ~self.allowed
            if actions is not None:
                forbidden &= self.allowed.gather(1, actions[:, None])
            logits.masked_fill_(forbidden, lowest)
        return logits

    def log_probs(self, logits: Tensor, actions: Tensor | None = None) -> Tensor:
        """Return the log-probs `(m, V)` of all tokens; the arguments are those of `logits`."""
        return self.logits(logits, actions).log_softmax(-1)

    def log_probs_of(self, logits: Tensor, actions: Tensor) -> Tensor:
        """Return the log-prob `(m,)` of one token in each state; the arguments are those of `logits`."""
        logits = self.logits(logits, actions)
        return logits.gather(1, actions[:, None])[:, 0] - logits.logsumexp(-1)
