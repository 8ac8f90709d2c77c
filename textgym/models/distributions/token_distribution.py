"""TokenDistribution: how logits become a distribution over the next token.

Whatever samples tokens or scores them goes through here: stepping, generation, packed passes, the reference, SB3
policies, Q-functions. So a log-prob means the same everywhere, and a ratio of two starts at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from textgym.models.decoding.stop_tokens import stop_tokens


@dataclass(frozen=True)
class TokenDistribution:
    """The distribution softmax(logits / temperature) over the tokens that may come next, in each of m states.

    It is computed in float32 whatever the model's dtype, since bfloat16 has 8 bits for a log-prob.

    >>> TokenDistribution(0.5).log_probs(torch.tensor([[0.0, 1.0]])).exp()
    tensor([[0.1192, 0.8808]])
    >>> masked = TokenDistribution(banned=torch.tensor([True, False]), stop_ids=(0,))
    >>> masked.log_probs(torch.zeros(2, 2)).exp()
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])

    Attributes:
        temperature: divides the logits.
        allowed: bool `(m, V)`, which tokens may be chosen; `None` allows all.
        banned: bool `(m,)`, or `(1,)` for all states: where `stop_ids` may not be chosen; `None` bans them nowhere.
        stop_ids: stop tokens.
    """

    temperature: float = 1.0
    allowed: Tensor | None = None
    banned: Tensor | None = None
    stop_ids: tuple[int, ...] = ()

    def __getitem__(self, rows: slice) -> TokenDistribution:
        """The distribution in some of the states."""
        allowed = None if self.allowed is None else self.allowed[rows]
        banned = None if self.banned is None else self.banned[rows]
        return TokenDistribution(self.temperature, allowed, banned, self.stop_ids)

    def logits(self, logits: Tensor, actions: Tensor | None = None) -> Tensor:
        """Return the logits `(m, V)` of the distribution, float32; the lowest float where a token may not be chosen.

        The lowest float and not -inf, whose product with a probability of 0 is NaN.

        Args:
            logits: `(m, V)`, as the output head gave them. They are overwritten, unless gradients flow through them.
            actions: `(m,)`, the tokens to be scored. An agent that chose a forbidden one is scored by the distribution
                without the mask or ban that forbids it, so its log-prob stays finite.
        """
        logits = logits.float()
        bans = self.banned is not None and bool(self.stop_ids)
        if self.temperature == 1.0 and self.allowed is None and not bans:
            return logits  # a copy less of what is large
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
        """Return the log-probs `(m, V)` of all tokens; arguments as `logits`."""
        return self.logits(logits, actions).log_softmax(-1)

    def log_probs_of(self, logits: Tensor, actions: Tensor) -> Tensor:
        """Return the log-prob of one token in each state, `(m,)`; arguments as `logits`."""
        logits = self.logits(logits, actions)
        return logits.gather(1, actions[:, None])[:, 0] - logits.logsumexp(-1)
