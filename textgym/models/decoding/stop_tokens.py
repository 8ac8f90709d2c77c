"""Stop tokens as tensors, which are made once: each list that becomes a tensor on a GPU makes the host wait."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class StopTokens(NamedTuple):
    """`ids` int64 `(s,)`, and `table` bool `(V,)`, which says of each token whether it is one. Not to be written."""

    ids: Tensor
    table: Tensor


@lru_cache(maxsize=64)
def stop_tokens(stop_ids: tuple[int, ...], vocab_size: int, device: torch.device) -> StopTokens:
    """The stop tokens that a model with V tokens has; the others can never be sampled."""
    known = [token for token in stop_ids if token < vocab_size]
    with torch.inference_mode(False):  # or autograd could not use them later
        ids = torch.tensor(known, dtype=torch.long, device=device)
        table = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        table[ids] = True
    return StopTokens(ids, table)
