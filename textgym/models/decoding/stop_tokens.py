"""Stop tokens as tensors. They are cached, because to copy a list to a GPU makes the host wait."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class StopTokens(NamedTuple):
    """Stop tokens as `ids` int64 `(s,)` and as `table` bool `(V,)`; read-only, because all callers share them."""

    ids: Tensor
    table: Tensor


@lru_cache(maxsize=64)
def stop_tokens(stop_ids: tuple[int, ...], vocab_size: int, device: torch.device) -> StopTokens:
    """Return the stop tokens below V as tensors; a model with V tokens never samples the others."""
    known = [token for token in stop_ids if token < vocab_size]
    with torch.inference_mode(False):  # autograd could not use inference tensors later
        ids = torch.tensor(known, dtype=torch.long, device=device)
        table = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        table[ids] = True
    return StopTokens(ids, table)
