"""Prompts as an environment keeps them: text, and token ids that are cut to its width and padded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.data.encoding import cut_beginning
from textgym.data.messages import Text, render
from textgym.data.rows import Row
from textgym.errors import CutPromptsWarning


def prompt_text(prompt: Text, tokenizer: Any) -> str:
    """Return a prompt as the model reads it: messages by the chat template."""
    return prompt if isinstance(prompt, str) else render(prompt, tokenizer, add_generation_prompt=True)


def cut_prompts(
    encoded: list[list[int]], width: int, bos_token_id: int | None, max_prompt_tokens: int | None
) -> list[list[int]]:
    """Return prompts of at most `width` tokens, cut at their beginning, with a warning that counts what is lost.

    Args:
        encoded: Token ids of each prompt.
        width: The most tokens of a prompt.
        bos_token_id: The token that stays at the beginning.
        max_prompt_tokens: The environment's argument, for the warning.
    """
    lost = [len(ids) - width for ids in encoded if len(ids) > width]
    if lost:
        warnings.warn(
            f"{len(lost)} of {len(encoded)} prompts have more than {width} tokens and lose {sum(lost)} tokens at their "
            f"beginning: raise max_prompt_tokens={max_prompt_tokens}, or shorten them",
            CutPromptsWarning,
            stacklevel=6,
        )
    return [cut_beginning(ids, width, bos_token_id) for ids in encoded]


def padded_prompts(prompts: list[list[int]], rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as right-padded ids `(P, L)` and their lengths `(P,)`.

    Args:
        prompts: Token ids of each prompt.
        rows: The rows that they are from, for the error.

    Raises:
        ValueError: If a prompt has no tokens.
    """
    lengths = np.array([len(ids) for ids in prompts], dtype=np.int64)
    if not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0])
        raise ValueError(f"prompt {row} ({rows[row]['prompt']!r}) has no tokens: give it some text")
    ids = np.zeros((len(prompts), lengths.max()), dtype=np.int32)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(prompts)
    return ids, lengths
