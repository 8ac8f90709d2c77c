"""Conversations: lists of messages, each with a `role` and a `content`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textgym.data.special_tokens import reads_control_tokens

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


def check_characters(text: str) -> None:
    """Check that a text consists of characters, which all tokenizers can read.

    Raises:
        ValueError: If it has a lone surrogate, which is half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(error.start - 40, 0) : error.start + 40]
        raise ValueError(
            f"{shown!r} has the lone surrogate {text[error.start]!r} at character {error.start}, which is half of a "
            "character and cannot be encoded: remove it, or replace it by text.encode('utf-8', 'replace').decode()"
        ) from error


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
        add_generation_prompt: Whether to open the assistant's next turn at the end. If the last message is the
            assistant's, that message is left open instead, to be continued.

    Raises:
        ValueError: If the tokenizer cannot render the conversation.
    """
    if reads_control_tokens(tokenizer):
        return str(apply_template(messages, tokenizer, add_generation_prompt, tokenize=False))
    # mistral-common renders ids; its strings are not the text.
    ids = apply_template(messages, tokenizer, add_generation_prompt, tokenize=True)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def apply_template(messages: Messages, tokenizer: Any, add_generation_prompt: bool, *, tokenize: bool) -> Any:
    """Return a conversation as the tokenizer renders it: a string, or ids if `tokenize` is set.

    Raises:
        ValueError: If the tokenizer cannot render the conversation.
    """
    continued = add_generation_prompt and messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=tokenize,
            return_dict=False,
            add_generation_prompt=add_generation_prompt and not continued,
            continue_final_message=continued,
        )
    except Exception as error:  # a template may raise anything
        missing = reads_control_tokens(tokenizer) and not tokenizer.chat_template
        reason = "has no chat template, so it cannot read a conversation" if missing else f"cannot render it ({error})"
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} {reason}: set `tokenizer.chat_template`, or pass the text as a "
            f"string instead of {messages!r}"
        ) from error


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer renders conversations; some do so without a `chat_template`."""
    if tokenizer.chat_template:
        return True
    try:
        render([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True)
    except ValueError:
        return False
    return True
