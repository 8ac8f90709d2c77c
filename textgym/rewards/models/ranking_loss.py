"""Losses of a reward model on rankings of K texts, and batches of rankings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from textgym.rewards.models.last_token import pad_right


class RankedTexts(NamedTuple):
    """Token ids of K texts of one prompt, and a value of each; the highest is the best."""

    texts: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]
    cluster: int


def ranked_pairs_loss(scores: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """Return -1 / C(K, 2) sum_{i before j} log sigmoid(s_i - s_j) of each ranking, `(R,)`.

    This is equation 1 of Ouyang et al. (2022, InstructGPT): each prompt has the same weight, however many texts were
    ranked. Ties add nothing.

    Args:
        scores: `(R, K)` scores s of the texts.
        values: `(R, K)`; the higher one of two texts is before the other.
        real: Bool `(R, K)`, the texts that are no padding.
    """
    differences = scores[:, :, None] - scores[:, None, :]  # (R, K, K)
    losses = torch.where(_before(values, real), -F.logsigmoid(differences), 0.0)
    count = real.sum(1)  # K
    return losses.sum((1, 2)) / (count * (count - 1) / 2).clamp(min=1)


def plackett_luce_loss(scores: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """Return -log P(ranking) by the model of Luce (1959) and Plackett (1975), `(R,)`.

    The best text is chosen first, then the best of the others, and so on:

        P = prod_i exp(s_i) / (exp(s_i) + sum_{j after i} exp(s_j))

    Of K = 2 texts this is the model of Bradley and Terry (1952). Texts with equal values are not compared with each
    other: each is chosen before those after it.

    Args:
        scores: `(R, K)` scores s of the texts.
        values: `(R, K)`; the higher one of two texts is before the other.
        real: Bool `(R, K)`, the texts that are no padding.
    """
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    candidates = _before(values, real) | itself  # (R, K, K): text j was to be had when i was chosen
    everything = scores[:, None, :].expand(candidates.shape).masked_fill(~candidates, -torch.inf)
    return torch.where(real, everything.logsumexp(2) - scores, 0.0).sum(1)


def regression_loss(scores: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """Return the sum of (s_i - value_i)^2 over the texts of each ranking, `(R,)`."""
    return torch.where(real, scores - values, 0.0).square().sum(1)


def _before(values: Tensor, real: Tensor) -> Tensor:
    """Return bool `(R, K, K)`: whether text i is before text j."""
    return (values[:, :, None] > values[:, None, :]) & real[:, :, None] & real[:, None, :]


LOSSES = {"ranked_pairs": ranked_pairs_loss, "plackett_luce": plackett_luce_loss, "regression": regression_loss}


class RankingObjective:
    """Objective of `fit` on rankings: the mean loss of rankings, or of texts for `"regression"`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def collate(self, rankings: Sequence[RankedTexts]) -> dict[str, Any]:
        """Return a batch of rankings in which each text is once.

        Returns:
            `texts`, padded ids `(N, T)` and lengths `(N,)`, and `(R, K)` of each ranking: the `places` of its texts in
            them, their `values`, and whether they are `real`.
        """
        texts = list(dict.fromkeys(text for ranking in rankings for text in ranking.texts))
        place = {text: index for index, text in enumerate(texts)}
        places, lengths = pad_right([[place[text] for text in ranking.texts] for ranking in rankings])
        width = places.shape[1]
        values = [[*ranking.values, *[0.0] * (width - len(ranking.values))] for ranking in rankings]
        return {
            "texts": pad_right(texts),
            "places": places,
            "values": torch.tensor(values),
            "real": torch.arange(width) < lengths[:, None],
        }

    def loss(self, scores: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, with the scores `(N,)` of its texts."""
        losses = LOSSES[self.kind](scores[batch["places"]], batch["values"], batch["real"])  # (R,)
        return losses.sum() / self.weight(batch)

    def weight(self, batch: dict[str, Any]) -> Tensor:
        """Return the number that the loss of a batch is a mean over."""
        real: Tensor = batch["real"]
        return real.sum() if self.kind == "regression" else real.any(1).sum()
