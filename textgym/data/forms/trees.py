"""Trees of messages with ranked replies, as in OpenAssistant: nested, or with one message a row.

A nested tree is the message that opens it, with `replies`, which have replies in turn. Flat rows name the message that
they reply to by `parent_id`. Ranks are those among the replies to one message; the lowest is the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

from textgym.data.messages import Messages, checked_text, shortened
from textgym.errors import DataError

Node = Mapping[str, Any]
ROLES = {"prompter": "user", "assistant": "assistant"}
KEYS = ("message_id", "parent_id", "role", "text")
"""Keys of a row that is one message of a tree."""


def is_one_message(row: Any) -> bool:
    """Return whether a row is one message of a tree."""
    return isinstance(row, Mapping) and set(KEYS) <= set(row)


def with_whole_trees(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield rows with their places, in which rows of one message each are put together to `{"prompt": tree}`.

    Messages that are marked as `deleted` are left out, with the replies to them.

    Raises:
        DataError: If a message is there twice, or the one that it replies to is missing.
    """
    rows = list(rows)
    if not rows or not is_one_message(rows[0][1]):
        yield from rows
        return
    nodes: dict[str, dict[str, Any]] = {}
    for place, row in rows:
        if not is_one_message(row):
            raise DataError(f"{place} is {shortened(row)}: the rows before it have {KEYS}, one message a row")
        if row["message_id"] in nodes:
            raise DataError(f"{place} has the message_id {row['message_id']!r} of a row before it: keep one of them")
        nodes[row["message_id"]] = {**row, "replies": [], "place": place}

    for node in nodes.values():
        _check_ancestors(node, nodes)
        if node["parent_id"] is not None and not node.get("deleted"):
            nodes[node["parent_id"]]["replies"].append(node)
    for node in nodes.values():
        if node["parent_id"] is None and not node.get("deleted"):
            yield node["place"], {"prompt": node}


def answers_of_tree(node: Node, place: str, before: Messages | None = None) -> list[tuple[Messages, Messages]]:
    """Return the best answer to each message of a user, with the conversation before it, which has best answers alone.

    The best answer is the one with the lowest rank, or the first one if none has a rank.
    """
    before = [*(before or []), message_of(node, place)]
    replies = list(node.get("replies") or [])
    answers = [reply for reply in replies if reply.get("role") == "assistant"]
    best = min(answers, key=lambda answer: _rank_or_last(answer, place), default=None)
    found = [] if best is None else [(before, [message_of(best, place)])]
    for reply in replies:
        if reply is best or reply.get("role") != "assistant":
            found += answers_of_tree(reply, place, before)
    return found


def message_of(node: Node, place: str) -> dict[str, Any]:
    """Return a message of a tree as one of a conversation.

    Raises:
        DataError: If its role is neither a prompter's nor the assistant's, or it has no text.
    """
    role = node.get("role")
    if role not in ROLES:
        raise DataError(f"a message of {place} has the role {role!r}: use one of {sorted(ROLES)}")
    return {"role": ROLES[role], "content": checked_text(node.get("text"), "text", place)}


def checked_rank(rank: Any, place: str) -> float:
    """Return a rank as a number.

    Raises:
        DataError: If it is none.
    """
    if not isinstance(rank, Real) or isinstance(rank, bool) or not math.isfinite(rank):
        raise DataError(f"a rank of {place} is {shortened(rank)}: it must be a number; the lowest is the best")
    return float(rank)


def _rank_or_last(answer: Node, place: str) -> float:
    return math.inf if answer.get("rank") is None else checked_rank(answer["rank"], place)


def _check_ancestors(node: Node, nodes: Mapping[str, Node]) -> None:
    """Check that the messages before a message are there, up to the one that opens the tree."""
    seen = {node["message_id"]}
    current = node
    while (parent := current["parent_id"]) is not None:
        if parent not in nodes:
            raise DataError(
                f"{current['place']} replies to the message {parent!r}, which is not among the rows: keep whole trees, "
                "such as by choosing rows by 'message_tree_id'"
            )
        if parent in seen:
            raise DataError(f"{node['place']} is among the messages before itself: look at its 'parent_id'")
        seen.add(parent)
        current = nodes[parent]
