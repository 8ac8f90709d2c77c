"""Conversations: lists of messages, each with a `role` and a `content`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages


def is_messages(text: Any) -> bool:
    """Return whether a text is a conversation, that is, a non-empty list of messages.

    >>> is_messages([{"role": "user", "content": "Hello"}]), is_messages("Hello")
    (True, False)
    """
    return (
        isinstance(text, Sequence)
        and not isinstance(text, str)
        and len(text) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in text)
    )


def content(text: Text) -> str:
    """Return a text as a string; for a conversation, the contents of its messages on separate lines.

    >>> content("Hello"), content([{"role": "assistant", "content": "Hi."}])
    ('Hello', 'Hi.')
    """
    return text if isinstance(text, str) else "\n".join(str(message["content"]) for message in text)


def plain(texts: Sequence[Text]) -> list[str]:
    """Return the `content` of each text."""
    return [content(text) for text in texts]


def render(messages: Messages, tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """Render a conversation as a string with the tokenizer's chat template.

    Args:
        messages: The conversation.
        tokenizer: The tokenizer of the model that reads the text.
        add_generation_prompt: Whether to open the assistant's next turn at the end.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so it cannot read a conversation: "
            "set `tokenizer.chat_template`, or pass the text as a string"
        )
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text


def encode(texts: Sequence[Text], tokenizer: Any, add_generation_prompt: bool = False) -> list[list[int]]:
    """Return the token ids of strings and conversations."""
    # Strings get the tokenizer's special tokens. Chat templates contain them already: adding them would double the BOS.
    rows: list[list[int]] = [[] for _ in texts]
    for conversational in (False, True):
        chosen = [index for index, text in enumerate(texts) if isinstance(text, str) != conversational]
        plain = [
            text if isinstance(text, str) else render(text, tokenizer, add_generation_prompt)
            for text in (texts[index] for index in chosen)
        ]
        if plain:
            encoded = tokenizer(plain, add_special_tokens=not conversational).input_ids
            for index, ids in zip(chosen, encoded, strict=True):
                rows[index] = ids
    return rows
