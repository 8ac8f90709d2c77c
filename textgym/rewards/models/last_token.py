"""Reads a score at the last real token of right-padded rows, found by length and never by looking for a pad id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from textgym.models.architectures.attention import pack, packed_hidden


class TextScores(NamedTuple):
    """Raw scores of texts, `(B, K)` float32 for K labels: read at the last token, and the mean over all tokens."""

    last: Tensor
    mean: Tensor


class LastTokenScorer(nn.Module):
    """The raw score of right-padded rows, in fp32 whatever the model's dtype."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, lengths: Tensor) -> TextScores:
        """Scores of `input_ids` `(B, T)`, of which row i holds `lengths[i]` tokens and then padding.

        Lengths are read on the host, so they had better be there.
        """
        head = score_head(self.classifier)
        if head is None:  # an encoder such as BERT, which pools by itself and is told what is padding
            slots = torch.arange(input_ids.shape[1], device=input_ids.device)
            mask = slots < lengths.to(input_ids.device)[:, None]  # (B, T)
            logits = self.classifier(input_ids=input_ids, attention_mask=mask.long()).logits.float()
            return TextScores(logits, logits)
        packed = pack(input_ids, lengths)
        hidden = packed_hidden(self.classifier, packed)  # (R * L, d)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            scores = F.linear(hidden.float(), head.weight.float(), bias)  # (R * L, K)
        sums = scores.new_zeros(len(packed.lengths) + 1, scores.shape[1])
        total = sums.index_add(0, packed.segments.flatten(), scores)[1:]  # the first is that of slots without a token
        return TextScores(scores[packed.starts + packed.lengths - 1], total / packed.lengths[:, None])


def score_head(classifier: PreTrainedModel) -> nn.Linear | None:
    """The head that decoder-only classifiers of transformers read the score with; `None` for encoders."""
    head = getattr(classifier, "score", None)
    return head if isinstance(head, nn.Linear) else None


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids `(B, T)`, zeros after the end of a row, and lengths `(B,)`; nobody may read the padding."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), lengths
