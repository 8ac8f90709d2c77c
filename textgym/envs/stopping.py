"""What ends a response: stop tokens, and stop strings that may lie across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.data.continuations import HALF, added_text
from textgym.data.special_tokens import special_tokens
from textgym.models.distributions.log_probs import StopRule


def stop_rule(stop: Sequence[str | int], min_new_tokens: int, tokenizer: Any) -> StopRule:
    """The tokenizer's EOS, the stop ids and special tokens; other strings are watched by `StopStrings` instead.

    Raises:
        ValueError: a stop id outside the vocabulary, or `stop` given as one string instead of a list.
    """
    if isinstance(stop, str):
        raise ValueError(f"stop is a list of strings and token ids: write stop=[{stop!r}]")
    ids = {tokenizer.eos_token_id, *(int(item) for item in stop if not isinstance(item, str))}
    special = special_tokens(tokenizer)
    ids |= {special[text.strip()] for text in stop if isinstance(text, str) and text.strip() in special}
    outside = sorted(index for index in ids if not 0 <= index < len(tokenizer))
    if outside:
        raise ValueError(f"stop ids {outside} are outside the tokenizer's vocabulary of {len(tokenizer)} tokens")
    return StopRule(tuple(sorted(ids)), min_new_tokens)


class StopStrings:
    """Finds stop strings in responses.

    A string that is a special token means this token, which is not in the text of a response, see `stop_rule`.

    Args:
        stop: Stop strings and stop ids.
        tokenizer: The policy's.
    """

    def __init__(self, stop: Sequence[str | int], tokenizer: Any) -> None:
        strings = [item for item in stop if isinstance(item, str)]
        if not all(strings):
            raise ValueError("a stop string is empty: every text would contain it")
        special = special_tokens(tokenizer) if strings else {}
        self.texts = [text for text in strings if text.strip() not in special]
        self.tokenizer = tokenizer
        self.last_characters = {text[-1] for text in self.texts}
        self.context: list[int] = tokenizer("a", add_special_tokens=False).input_ids if self.texts else []
        # Whether each token could complete a stop string: 1 or 0, -1 until it is first sampled. It grows as needed.
        self._completes = np.zeros(0, dtype=np.int8)

    def can_complete(self, tokens: np.ndarray) -> np.ndarray:
        """Bool, like `tokens`: which could complete a stop string, alone or as the last part of a character."""
        missing = int(tokens.max()) + 1 - len(self._completes)
        if missing > 0:
            self._completes = np.pad(self._completes, (0, missing), constant_values=-1)
        for token in np.unique(tokens[self._completes[tokens] < 0]).tolist():
            piece = added_text(self.tokenizer, self.context, [token])
            self._completes[token] = HALF in piece or not self.last_characters.isdisjoint(piece)
        return self._completes[tokens] == 1

    def found_in(self, text: str, early: int) -> bool:
        """Whether a stop string occurs and does not end in the first `early` characters."""
        return any(self._find(stop, text, early) >= 0 for stop in self.texts)

    def cut(self, text: str, early: int) -> str:
        """The text before the first stop string that does not end in the first `early` characters."""
        found = [index for stop in self.texts if (index := self._find(stop, text, early)) >= 0]
        return text[: min(found)] if found else text

    def _find(self, stop: str, text: str, early: int) -> int:
        return text.find(stop, max(0, early - len(stop) + 1))
