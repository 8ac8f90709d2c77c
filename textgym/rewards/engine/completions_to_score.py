"""Finished: the completions that reward functions score. RewardError: one of them broke its contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textgym.data.messages import Text
from textgym.errors import TextgymError

LONGEST_SHOWN = 2000
"""Characters of a text in an error."""


class RewardError(TextgymError, ValueError):
    """A reward function broke its contract; the message names the function, the row and its text."""


@dataclass(frozen=True)
class Finished:
    """Completions to score, N rows.

    Attributes:
        prompts: the prompts as text, or as messages where they are conversations.
        completions: the responses as text, without the stop token; as one message of the assistant's where the prompt
            is a conversation.
        prompt_ids: the prompts as the policy saw them.
        completion_ids: the tokens as they were sampled, stop token included.
        columns: further columns of the prompts' rows, each a list of N values.
        text_ids: the tokens of the completions' text, without the stop token or stop string that ended it; `None` if
            they are not known.
    """

    prompts: list[Text]
    completions: list[Text]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    text_ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> str:
        """A row in the words of an error; of long texts the beginning and the end."""
        return f"row {index} (prompt {_shown(self.prompts[index])}, completion {_shown(self.completions[index])})"


def _shown(text: Text) -> str:
    shown = repr(text)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[: LONGEST_SHOWN // 2]} ... {shown[-LONGEST_SHOWN // 2 :]}"
