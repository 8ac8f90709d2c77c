"""Read scores at the last real token of right-padded rows.

The last token is found from the length and not by searching for the padding id, as transformers does, because a text
may contain that id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from textgym.models.architectures.attention import pack, packed_hidden


class TextScores(NamedTuple):
    """Raw scores of texts for K labels, `(B, K)` float32: at the last token, and the mean over all tokens."""

    last: Tensor
    mean: Tensor


class LastTokenScorer(nn.Module):
    """Module that computes the raw scores of right-padded rows, in float32 whatever the dtype of the model."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, lengths: Tensor) -> TextScores:
        """Score rows of ids.

        Args:
            input_ids: `(B, T)` ids; row i has `lengths[i]` tokens, then padding.
            lengths: `(B,)`, preferably on the CPU, because they are read there.
        """
        head = score_head(self.classifier)
        if head is None:  # encoders such as BERT pool the text in their own way
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
        total = sums.index_add(0, packed.segments.flatten(), scores)[1:]  # segment 0 is padding
        return TextScores(scores[packed.starts + packed.lengths - 1], total / packed.lengths[:, None])


def score_head(classifier: PreTrainedModel) -> nn.Linear | None:
    """Return the linear head of a decoder-only classifier of transformers; `None` for encoders."""
    head = getattr(classifier, "score", None)
    return head if isinstance(head, nn.Linear) else None


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids `(B, T)`, padded with zeros on the right, and lengths `(B,)`; 0 may also be a real id."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), lengths
