"""Trees of messages: rows of one message each give the conversations and comparisons of the nested tree."""

from __future__ import annotations

import random
from typing import Any

import pytest

from textgym.data.completions import load_examples
from textgym.data.preferences import load_preferences
from textgym.errors import DataError


def message(name: str, parent: str | None, rank: float | None = None, **keys: Any) -> dict[str, Any]:
    """A row of oasst1; names of users' messages begin with q."""
    role = "prompter" if name.startswith("q") else "assistant"
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, "rank": rank, "lang": "en", **keys}


ROWS = [
    message("q1", None),
    message("a1", "q1", 1.0),
    message("a2", "q1", 0.0),
    message("q2", "a2", 0.0),
    message("q3", "a2", 1.0),
    message("a3", "q3"),
    message("q4", "a1"),
    message("a4", "q4", 0),
    message("a5", "q4", 1),
    message("q5", None),
    message("a6", "q5", None),
]


def names(text: Any) -> str:
    return " ".join(part["content"] for part in text)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_one_message_each_are_trees_in_any_order(seed: int) -> None:
    rows = random.Random(seed).sample(ROWS, len(ROWS))
    pairs = {(names(p["prompt"]), names(p["chosen"]), names(p["rejected"])) for p in load_preferences(rows)}
    assert pairs == {("q1", "a2", "a1"), ("q1 a1 q4", "a4", "a5")}
    examples = {(names(prompt), names(completion)) for prompt, completion in load_examples(rows)}
    assert examples == {("q1", "a2"), ("q1 a2 q3", "a3"), ("q5", "a6")}, "a1 is not the best answer"
    roles = [[part["role"] for part in prompt] for prompt, _ in load_examples(ROWS)]
    assert roles[1] == ["user", "assistant", "user"]


def test_a_nested_tree_gives_the_same_conversations() -> None:
    def nested(name: str) -> dict[str, Any]:
        row = next(row for row in ROWS if row["message_id"] == name)
        return {**row, "replies": [nested(other["message_id"]) for other in ROWS if other["parent_id"] == name]}

    trees = [{"message_tree_id": name, "prompt": nested(name)} for name in ("q1", "q5")]
    assert load_examples(trees) == load_examples(ROWS)
    assert load_preferences(trees) == load_preferences(ROWS)


def test_deleted_messages_are_left_out_with_what_follows_them() -> None:
    rows = [{**row, "deleted": row["message_id"] in ("a2", "q5")} for row in ROWS]
    assert [names(completion) for _, completion in load_examples(rows)] == ["a1", "a4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (message("q1", None), "row 11 of the examples has the message_id 'q1' of a row before it"),
        (message("a9", "q9"), "row 11 of the examples replies to the message 'q9', which is not among the rows"),
        (message("a9", "a9"), "row 11 of the examples is among the messages before itself"),
        ({"text": "All of it."}, "row 11 of the examples is {'text': 'All of it.'}: the rows before it have"),
        (message("a9", "q5", role="system"), "has the role 'system'"),
        (message("a9", "q5", rank="first"), "it must be a number; the lowest is the best"),
    ],
)
def test_rows_that_make_up_no_tree_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_examples([*ROWS, row])
    assert message in str(error.value)
