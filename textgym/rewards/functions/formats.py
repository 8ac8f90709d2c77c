"""Rewards for the format of a text: a JSON schema, a context-free grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from textgym.data.messages import Text, plain
from textgym.errors import ConfigError
from textgym.rewards.functions.rules import parse_json
from textgym.settings import check_settings


@dataclass(frozen=True)
class JsonSchema:
    """Reward of 1 if the whole completion is JSON that fits a schema, else 0 (extra `metrics`: jsonschema).

    >>> JsonSchema({"type": "object", "required": ["name"]})(['{"name": "Ada"}', '{"age": 36}', "Ada"])
    [1.0, 0.0, 0.0]

    Raises:
        ImportError: If jsonschema is missing; the message says how to install it.
        ConfigError: If the schema is invalid.
    """

    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_settings(self)
        self._validator()

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Score completions."""
        validator = self._validator()
        return [float(_is_valid(text, validator)) for text in plain(completions)]

    def _validator(self) -> Any:
        try:
            from jsonschema.exceptions import SchemaError
            from jsonschema.validators import validator_for
        except ImportError as error:
            raise ImportError("JsonSchema needs jsonschema: pip install 'textgym[metrics]'") from error
        kind = validator_for(self.schema)
        try:
            kind.check_schema(self.schema)
        except SchemaError as error:
            raise ConfigError(f"schema is no JSON schema: {error.message}") from error
        return kind(self.schema)


@dataclass(frozen=True)
class GrammarMatch:
    """Reward of 1 if the whole completion is a sentence of a context-free grammar, else 0 (extra `metrics`: lark).

    >>> GrammarMatch('start: /[0-9]+/ ("+" /[0-9]+/)*')(["1+2+3", "1+", "one"])
    [1.0, 0.0, 0.0]

    Attributes:
        grammar: The grammar in Lark's notation.
        start: Name of its start rule.

    Raises:
        ImportError: If lark is missing; the message says how to install it.
        ConfigError: If the grammar is invalid.
    """

    grammar: str
    start: str = "start"

    def __post_init__(self) -> None:
        check_settings(self)
        _parser(self.grammar, self.start)

    def __call__(self, completions: Sequence[Text], **_: Any) -> list[float]:
        """Score completions."""
        from lark.exceptions import UnexpectedInput

        def matches(text: str) -> bool:
            try:
                _parser(self.grammar, self.start).parse(text)
            except UnexpectedInput:
                return False
            return True

        return [float(matches(text)) for text in plain(completions)]


def _is_valid(text: str, validator: Any) -> bool:
    try:
        return bool(validator.is_valid(parse_json(text)))
    except ValueError:
        return False


@lru_cache(maxsize=16)
def _parser(grammar: str, start: str) -> Any:
    try:
        from lark import Lark
        from lark.exceptions import LarkError
    except ImportError as error:
        raise ImportError("GrammarMatch needs lark: pip install 'textgym[metrics]'") from error
    try:
        return Lark(grammar, start=start, parser="earley")  # LALR does not parse every context-free grammar
    except LarkError as error:
        raise ConfigError(f"grammar, with start={start!r}, is none in Lark's notation: {error}") from error
