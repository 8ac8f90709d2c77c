"""Conversations: lists of messages, each with a `role` and a `content`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textgym.data.special_tokens import reads_control_tokens
from textgym.data.tools import Tools, as_dict, as_json, warn_of_ignored_tools, with_arguments, with_tools, without_tools
from textgym.errors import DataError

Messages = list[dict[str, Any]]
Text = str | Messages
LONGEST_SHOWN = 300
"""Characters of a value in an error message."""


def is_messages(text: Any) -> bool:
    """Return whether a text is a conversation, that is, a non-empty list of messages.

    >>> is_messages([{"role": "user", "content": "Hello"}]), is_messages("Hello")
    (True, False)
    """
    return (
        isinstance(text, Sequence)
        and not isinstance(text, str)
        and len(text) > 0
        and all(
            isinstance(message, Mapping) and "role" in message and bool({"content", "tool_calls"} & set(message))
            for message in text
        )
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


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Return messages whose content is a string, without keys that have no value.

    Text in parts is joined. A message that only calls tools has an empty content. Keys whose value is `None` come from
    data sets that store all messages with the same keys.

    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "Hello"}], "tool_calls": None}])
    [{'role': 'user', 'content': 'Hello'}]

    Raises:
        DataError: If a content has a part that is not text, or is missing.
    """
    return [
        {key: value for key, value in message.items() if value is not None} | {"content": _plain_content(message)}
        for message in messages
    ]


def _plain_content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list | tuple) and content:
        return "".join(_text_of_part(part) for part in content)
    raise DataError(
        f"the content of a message of {message.get('role')!r} is {shortened(content)}: it must be a text or a list of "
        "text parts"
    )


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(
        f"a message has the part {shortened(part)}: models here read only text, {{'type': 'text', 'text': ...}}"
    )


def checked_text(text: Any, name: str, place: str) -> Text:
    """Return a text of a row, with conversations as `plain_messages`.

    Args:
        text: The value of the column.
        name: Name of the column, for error messages.
        place: Description of the row, for error messages.

    Raises:
        DataError: If it is neither a text nor a conversation, or has a lone surrogate.
    """
    if not isinstance(text, str) and not is_messages(text):
        raise DataError(
            f"{name!r} of {place} is {shortened(text)}: it must be a text or a list of messages, each with 'role' and "
            "'content'"
        )
    try:
        if isinstance(text, str):
            check_characters(text)
            return text
        messages = plain_messages(text)
        for message in messages:
            check_characters(message["content"])
        return messages
    except ValueError as error:
        raise DataError(f"{name!r} of {place}: {error}") from error


def conversation_with_tools(text: Text, tools: Tools, place: str) -> Text:
    """Return a conversation with the tools of its row, if there are any.

    Raises:
        DataError: If there are tools and the text is a string, which no chat template renders.
    """
    if not tools:
        return text
    if isinstance(text, str):
        raise DataError(
            f"{place} has 'tools' and the text {shortened(text)}: a chat template renders tools, and no template reads "
            "a string; pass a list of messages, or leave the column out"
        )
    return with_tools(text, tools)


def is_blank(text: Text) -> bool:
    """Return whether a text says nothing: only white space, and no calls of tools."""
    if isinstance(text, str):
        return not text.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in text)


def shortened(value: Any) -> str:
    """Return the `repr` of a value for an error message, without the middle of a long one."""
    shown = repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[: LONGEST_SHOWN - 50]} ... {shown[-40:]}"


def content(text: Text) -> str:
    """Return a text as a string; for a conversation, the contents of its messages on separate lines.

    >>> content("Hello"), content([{"role": "assistant", "content": "Hi."}])
    ('Hello', 'Hi.')
    """
    return text if isinstance(text, str) else "\n".join(_plain_content(message) for message in text)


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
    """Return a conversation as the tokenizer renders it with its tools: a string, or ids if `tokenize` is set.

    Raises:
        ValueError: If the tokenizer cannot render the conversation.
    """
    continued = add_generation_prompt and messages[-1]["role"] == "assistant"
    plain_ones, tools = without_tools(plain_messages(messages))

    def rendered(some: Messages, tools: Tools | None) -> Any:
        return tokenizer.apply_chat_template(
            some,
            tools=tools,
            tokenize=tokenize,
            return_dict=False,
            add_generation_prompt=add_generation_prompt and not continued,
            continue_final_message=continued,
        )

    def with_either_arguments(tools: Tools | None) -> Any:
        # Most templates write JSON, and would put a string in quotes; some add strings to their text and fail on dicts.
        try:
            return rendered(with_arguments(plain_ones, as_dict), tools)
        except Exception:
            if not any("tool_calls" in message for message in plain_ones):
                raise
            return rendered(with_arguments(plain_ones, as_json), tools)

    try:
        shown = with_either_arguments(tools)
        ignored = tools is not None and shown == with_either_arguments(None)
    except Exception as error:  # a template may raise anything
        missing = reads_control_tokens(tokenizer) and not tokenizer.chat_template
        reason = "has no chat template, so it cannot read a conversation" if missing else f"cannot render it ({error})"
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} {reason}: set `tokenizer.chat_template`, or pass the text as a "
            f"string instead of {messages!r}"
        ) from error
    if ignored:
        warn_of_ignored_tools(tokenizer.name_or_path)
    return shown


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer renders conversations; some do so without a `chat_template`."""
    if tokenizer.chat_template:
        return True
    try:
        render([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True)
    except ValueError:
        return False
    return True
