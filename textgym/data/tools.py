"""Tools that an assistant may call, and its calls, as chat templates take them.

A row has the tools of its conversation in the column `tools`: a list of JSON schemas, or a JSON string of one. Once it
is read they are a key of the conversation's first message, so that they stay with it until it is rendered.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from textgym.data.faults import level_of_caller
from textgym.errors import DataError, DataWarning

Message = dict[str, Any]
Tools = list[dict[str, Any]]
LONGEST_SHOWN = 200
"""Characters of a value in an error message."""


def tools_of(row: Mapping[str, Any], place: str) -> Tools:
    """Return the tools of a row; none if it has no such column or value.

    Keys whose value is `None` come from data sets that store all schemas with the same keys, and are left out.

    Raises:
        DataError: If the column is neither a list of JSON schemas nor a string of one.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"'tools' of {place} is a string that is not JSON ({error}): {_expected(tools)}") from error
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"'tools' of {place}: {_expected(tools)}")
    return [_without_nones(tool) for tool in tools]


def with_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """Return a conversation with tools, or as it is if there are none.

    >>> with_tools([{"role": "user", "content": "Hi"}], [{"name": "f"}])
    [{'role': 'user', 'content': 'Hi', 'tools': [{'name': 'f'}]}]
    """
    return [{**messages[0], "tools": tools}, *messages[1:]] if tools else list(messages)


def without_tools(messages: Sequence[Message]) -> tuple[list[Message], Tools | None]:
    """Return a conversation without its tools, and the tools, which templates take apart from the messages."""
    tools = messages[0].get("tools")
    if not tools or not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return list(messages), None
    return [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]], tools


def with_arguments(messages: Sequence[Message], convert: Callable[[Any], Any]) -> list[Message]:
    """Return a conversation in which the arguments of calls are converted, by `as_dict` or `as_json`."""
    return [
        {**message, "tool_calls": [_converted(call, convert) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), Sequence)
        else message
        for message in messages
    ]


def as_dict(arguments: Any) -> Any:
    """Return arguments as a dict, unless they are a string that is none: a call with a mistake is read as it is."""
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments
    return read if isinstance(read, dict) else arguments


def as_json(arguments: Any) -> Any:
    """Return arguments as a JSON string."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def warn_of_ignored_tools(name: str) -> None:
    """Warn that the chat template of a tokenizer renders a conversation with tools as it does without."""
    warnings.warn(
        f"the chat template of {name!r} ignores tools, so the model does not read which there are: use the template of "
        "a model that was trained with tools (tokenizer.chat_template), describe them in a system message, or leave "
        "out the column 'tools'",
        DataWarning,
        stacklevel=level_of_caller(),
    )


def _converted(call: Any, convert: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _converted(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call


def _without_nones(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nones(part) for key, part in value.items() if part is not None}
    return [_without_nones(part) for part in value] if isinstance(value, list | tuple) else value


def _expected(tools: Any) -> str:
    shown = repr(tools)
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]} ..."
    return f"it must be a list of JSON schemas, each a dict, or a JSON string of such a list, got {shown}"
