"""What ends a response: stop tokens, and stop strings that may lie across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textgym.envs.episodes import Episodes
from textgym.models.distributions.log_probs import StopRule


def stop_rule(stop: Sequence[str | int], min_new_tokens: int, tokenizer: Any) -> StopRule:
    """The tokenizer's EOS and the stop ids; strings are watched by `StopStrings` instead.

    Raises:
        ValueError: a stop id outside the vocabulary, or `stop` given as one string instead of a list.
    """
    if isinstance(stop, str):
        raise ValueError(f"stop is a list of strings and token ids: write stop=[{stop!r}]")
    ids = {tokenizer.eos_token_id, *(int(item) for item in stop if not isinstance(item, str))}
    outside = sorted(index for index in ids if not 0 <= index < len(tokenizer))
    if outside:
        raise ValueError(f"stop ids {outside} are outside the tokenizer's vocabulary of {len(tokenizer)} tokens")
    return StopRule(tuple(sorted(ids)), min_new_tokens)


class StopStrings:
    """Finds stop strings in responses, decoding only rows whose newest token could complete one.

    Args:
        texts: the stop strings.
        tokenizer: the policy's.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        if not all(texts):
            raise ValueError("a stop string is empty: every text would contain it")
        self.texts = list(texts)
        self.can_complete: Tensor | None = None
        if self.texts:
            last = {text[-1] for text in self.texts}
            pieces = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
            # A token that is part of a multi-byte character decodes to the replacement mark: it may complete one, too.
            table = [bool(last & set(piece)) or "\ufffd" in piece for piece in pieces]
            self.can_complete = torch.from_numpy(np.array(table))

    def candidates(self, actions: Tensor, playing: Tensor, episodes: Episodes) -> list[int]:
        """Rows among those `playing` whose newest token could complete a stop string."""
        assert self.can_complete is not None
        self.can_complete = self.can_complete.to(actions.device)
        possible = self.can_complete[actions.clamp(max=len(self.can_complete) - 1)]
        long_enough = episodes.response_lengths > episodes.stop.min_new_tokens
        return (possible & playing & long_enough).nonzero()[:, 0].tolist()

    def found_in(self, text: str) -> bool:
        """Whether a stop string occurs."""
        return any(stop in text for stop in self.texts)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        found = [index for stop in self.texts if (index := text.find(stop)) >= 0]
        return text[: min(found)] if found else text
