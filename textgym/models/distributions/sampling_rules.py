"""SamplingRules: how tokens are chosen from a model's distribution, besides temperature and stop tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.settings import Count, Positive, PositiveShare, check_settings


@dataclass(frozen=True)
class SamplingRules:
    """Rules for sampling that depend on the context or on the other tokens, as in transformers' `generate`.

    They are for evaluation: the log-probs of sampled tokens are those of the distribution with the rules, but losses
    are of the model's own distribution, so agents refuse a policy that has some.

    >>> rules, logits = SamplingRules(min_p=0.4), torch.tensor([[0.6, 0.3, 0.1]]).log()
    >>> rules.log_probs(logits, TokenDistribution(), torch.tensor([[2]]), torch.tensor([1])).exp().round(decimals=2)
    tensor([[0.6700, 0.3300, 0.0000]])
    """

    min_p: PositiveShare | None = None
    """Only tokens that are at least this share as likely as the most likely one (Nguyen et al., 2024)."""
    repetition_penalty: Positive = 1.0
    """Divide positive logits of the tokens of prompt and response by this, and multiply negative ones (Keskar et al.,
    2019); above 1 against repetition."""
    no_repeat_ngram_size: Count | None = None
    """No sequence of so many tokens of prompt and response occurs twice."""

    def __post_init__(self) -> None:
        check_settings(self)

    def __bool__(self) -> bool:
        return self != SamplingRules()

    def __str__(self) -> str:
        return ", ".join(
            f"{name}={value}" for name, value in vars(self).items() if value != vars(SamplingRules())[name]
        )

    def log_probs(self, logits: Tensor, distribution: TokenDistribution, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the log-probs `(B, V)` of the next tokens; the rules apply in the order of transformers.

        Args:
            logits: `(B, V)`, the output of the head.
            distribution: Temperature, mask and banned stop tokens.
            input_ids: `(B, W)`, the contexts, right-padded.
            lengths: `(B,)`, number of tokens of each context.
        """
        vocab_size = logits.shape[1]
        if self.repetition_penalty != 1.0:
            real = left_padded(input_ids, lengths, input_ids[:, :1])  # a token of the row, which changes nothing
            logits = RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))(real, logits.float())
        logits = distribution.logits(logits)
        possible = logits > torch.finfo(logits.dtype).min

        if self.no_repeat_ngram_size is not None:
            slots = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            unequal = left_padded(input_ids, lengths, vocab_size + slots)  # padding that repeats nothing
            scores = logits.new_zeros(len(logits), vocab_size + slots.numel())  # with places for the padding
            repeated = NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size)(unequal, scores)[:, :vocab_size] < 0
            allowed = possible & ~repeated
            repeated &= allowed.any(-1, keepdim=True)  # if all tokens would repeat something, one of them does
            logits = logits.masked_fill(repeated, -torch.inf)
        if self.min_p is not None:
            logits = MinPLogitsWarper(self.min_p)(input_ids, logits)  # type: ignore[arg-type]  # it is of int64
        return logits.log_softmax(-1)


NO_RULES = SamplingRules()
"""Sampling from the distribution as it is."""


def left_padded(input_ids: Tensor, lengths: Tensor, padding: Tensor) -> Tensor:
    """Return contexts `(B, W)` with their tokens on the right, and `padding` `(B or 1, W or 1)` on the left."""
    width = input_ids.shape[1]
    source = torch.arange(width, device=input_ids.device) - (width - lengths[:, None])  # (B, W)
    return torch.where(source >= 0, input_ids.gather(1, source.clamp(min=0)), padding)
