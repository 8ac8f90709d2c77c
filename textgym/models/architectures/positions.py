"""Positions: how long a text a model can read, and whether its position embeddings change with the length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def position_limit(config: Any) -> int | None:
    """How many tokens a text may have, by the config of a model; `None` if positions are relative and set no limit."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None

    for rope in _ropes(text):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original is not None:
            limit = min(limit, original)  # beyond it the frequencies are others, see `changing_rope`
        elif original is not None:
            limit = max(limit, int(original * (rope.get("factor") or 1.0)))
    return int(limit)


def check_positions(config: Any, tokens: int, text: str = "a text") -> None:
    """Refuse a text that is longer than a model can read: an index error for some models, wrong logits for others.

    Args:
        config: of the model.
        tokens: of the text.
        text: what to call it.

    Raises:
        ValueError: the text is too long for the model.
    """
    limit = position_limit(config)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{text} has up to {tokens} tokens, and the model ({config.model_type}) has positions for {limit}: lower "
            "max_prompt_tokens or max_new_tokens, or use a model for longer texts"
        )


def changing_rope(config: Any) -> str | None:
    """Why a model cannot be decoded exactly whose rotary embeddings change as a text grows; `None` if they do not.

    Keys in a cache were rotated by the frequencies of a shorter text, and texts in one batch by those of the longest.
    """
    text = config.get_text_config(decoder=True)
    for rope in _ropes(text):
        kind = rope.get("rope_type", "default")
        if "dynamic" in kind:
            return (
                f"has rotary embeddings of type {kind!r}, which change for all tokens of a text when it grows beyond "
                f"{text.max_position_embeddings} tokens, so a cache would be wrong: load it with "
                "rope_parameters={'rope_type': 'default', ...}, which is the same model up to that length, or with "
                "'linear' or 'yarn'"
            )
        if kind == "longrope" and rope["long_factor"] != rope["short_factor"]:
            original = rope["original_max_position_embeddings"]
            if text.max_position_embeddings > original:
                return (
                    f"has rotary embeddings of type 'longrope', which change for all tokens of a text when it grows "
                    f"beyond {original} tokens, so a cache would be wrong: set the config's "
                    "rope_parameters['long_factor'] to its 'short_factor' before you load it, for texts up to that "
                    "length, or use a model with a fixed rope"
                )
    return None


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of rotary embeddings; some models have others for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters or not parameters:
        yield parameters
        return
    yield from (rope for rope in parameters.values() if isinstance(rope, dict))
