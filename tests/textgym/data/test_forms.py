"""Forms of preferences: whatever a data set looks like, the same prompt and the same two texts come out."""

from __future__ import annotations

from typing import Any

import pytest

from textgym.data.preferences import load_preferences, text_of
from textgym.errors import DataError


def user(text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def said(text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


SYSTEM = {"role": "system", "content": "Be brief."}
ASK, YES, NO = user("Is it good?"), said("Yes."), said("No.")
TALK = ([ASK], [YES], [NO])


def parts(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    [pair] = load_preferences([row])
    return pair.get("prompt"), pair["chosen"], pair["rejected"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, TALK, id="apart"),
        pytest.param({"chosen": [ASK, YES], "rejected": [ASK, NO]}, TALK, id="within"),
        pytest.param({"prompt": "Is it good?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, TALK, id="H4"),
        pytest.param({"prompt": "Is it  good? ", "chosen": [ASK, YES], "rejected": [ASK, NO]}, TALK, id="H4, spaces"),
        pytest.param({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, TALK, id="whole and prompt"),
        pytest.param({"prompt": None, "chosen": [ASK, YES], "rejected": [ASK, NO]}, TALK, id="prompt is None"),
        pytest.param({"prompt": [ASK], "chosen": [YES], "rejected": "No."}, TALK, id="one side a string"),
        pytest.param(
            {"prompt": "Is it good?", "chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]},
            ([SYSTEM, ASK], [YES], [NO]),
            id="H4 with a system message",
        ),
        pytest.param(
            {"prompt": "Is it good?", "chosen": [ASK, YES, ASK, YES], "rejected": [ASK, YES, ASK, NO]},
            ([ASK, YES, ASK], [YES], [NO]),
            id="several turns",
        ),
        pytest.param(
            {"prompt": "And?", "chosen": [ASK, NO, user("And?"), YES], "rejected": [ASK, NO, user("And?"), NO]},
            ([ASK, NO, user("And?")], [YES], [NO]),
            id="the prompt is the last question",
        ),
        pytest.param(
            {
                "prompt": "User: Is it good? You: No. User: Is it good?",
                "chosen": [ASK, NO, ASK, YES],
                "rejected": [ASK, NO, ASK, NO],
            },
            ([ASK, NO, ASK], [YES], [NO]),
            id="the prompt is all of it",
        ),
        pytest.param(
            {
                "chosen": [user([{"type": "text", "text": "Is it "}, {"type": "text", "text": "good?"}]), YES],
                "rejected": [ASK, NO],
            },
            TALK,
            id="content in parts",
        ),
        pytest.param(
            {"chosen": [{**ASK, "tool_calls": None, "name": None}, YES], "rejected": [ASK, {**NO, "name": None}]},
            TALK,
            id="keys without a value",
        ),
        pytest.param(
            {"history": "Is it good?", "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 0}, TALK, id="SHP"
        ),
        pytest.param(
            {"prompt": "Is it good?", "answers": [{"answer": " No.", "rank": 2.0}, {"answer": " Yes.", "rank": 1.0}]},
            ("Is it good?", " Yes.", " No."),
            id="Nectar",
        ),
        pytest.param(
            {
                "prompt": {
                    "role": "prompter",
                    "text": "Is it good?",
                    "replies": [
                        {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
                        {
                            "role": "assistant",
                            "text": "Yes.",
                            "rank": 0,
                            "replies": [{"role": "prompter", "text": "Ok."}],
                        },
                        {"role": "assistant", "text": "?", "rank": None},
                    ],
                }
            },
            TALK,
            id="OpenAssistant",
        ),
        pytest.param(
            {"prompt": "Is it good?", "chosen": "Is it good? Yes.", "rejected": "Is it good? No."},
            ("Is it good?", " Yes.", " No."),
            id="strings that repeat the prompt",
        ),
        pytest.param(
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
            (None, "\n\nHuman: Hi\n\nAssistant: Yes.", "\n\nHuman: Hi\n\nAssistant: No."),
            id="hh-rlhf",
        ),
        pytest.param(
            {"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi there"}, ("Hi", "Hi you", "Hi there"), id="one word"
        ),
    ],
)
def test_a_form_is_read_as_prompt_and_two_texts(row: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    assert parts(row) == expected
    [pair] = load_preferences([row])
    assert load_preferences([pair]) == [pair], "what was read once stays"


def test_the_whole_text_has_the_prompt_once() -> None:
    [pair] = load_preferences([{"prompt": "Is it good?", "chosen": [ASK, YES], "rejected": [ASK, NO]}])
    assert text_of(pair, "chosen") == [ASK, YES]
    [pair] = load_preferences([{"prompt": "Is it good?", "chosen": "Is it good? Yes.", "rejected": "Is it good? No."}])
    assert text_of(pair, "rejected") == "Is it good? No."


def test_answers_are_compared_where_their_ranks_differ() -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("a", 1), ("b", 2), ("c", 2), ("d", 3))]
    pairs = load_preferences([{"prompt": "p", "answers": answers}])
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        ("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d"),
    }  # fmt: skip


def test_turns_that_call_tools_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "3"}
    prompt, chosen, _ = parts({"prompt": [ASK], "chosen": [call, result, YES], "rejected": [NO]})
    assert prompt == [ASK]
    assert chosen == [{**call, "content": ""}, result, YES]


GOOD = {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": float("nan")}, "'margin' of row 1 of the preferences is nan: it must be a finite number, or None"),
        ({"margin": "large"}, "'margin' of row 1 .* is 'large'"),
        ({"margin": [1.0]}, r"'margin' of row 1 .* is \[1.0\]"),
        ({"probability": [0.5]}, r"'probability' of row 1 .* is \[0.5\]: it must be a number between 0 and 1"),
        ({"probability": float("nan")}, "'probability' of row 1 .* is nan"),
        ({"probability": True}, "'probability' of row 1 .* is True"),
        ({"group": [1]}, r"'group' of row 1 .* is \[1\]: it must be a string or a number"),
        ({"chosen": ["Yes."]}, r"'chosen' of row 1 .* is \['Yes.'\]: it must be a text or a list of messages"),
        ({"chosen": 1}, "'chosen' of row 1 .* is 1: it must be a text"),
        ({"chosen": None}, r"row 1 .* has the keys \['prompt', 'rejected'\]: it needs 'chosen' and 'rejected'"),
        ({"prompt": float("nan")}, "'prompt' of row 1 .* is nan"),
        ({"chosen": "half \ud83d"}, "'chosen' of row 1 of the preferences: .* has the lone surrogate"),
        ({"chosen": [said([{"type": "image"}])]}, "'chosen' of row 1 .*: a message has the part .*'image'.*only text"),
        ({"chosen": [said(None)]}, "'chosen' of row 1 .*: the content of a message of 'assistant' is None"),
        ({"chosen": [said(5)]}, "'chosen' of row 1 .*: the content of a message of 'assistant' is 5"),
        (
            {"prompt": "Something else?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            "the conversations of row 1 .* begin with .* but its 'prompt' is 'Something else[?]'",
        ),
        ({"chosen": [ASK, YES], "rejected": [NO]}, "the conversations of row 1 of the preferences begin with"),
        ({"prompt": None, "chosen": "a", "rejected": [NO]}, "one text of row 1 .* is a string and the other a conver"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_row(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences([GOOD, {**GOOD, **change}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": [1]}, r"'labels' of row 0 .* is \[1\]"),
        ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "'labels' of row 0 .* is 2"),
        ({"prompt": "p", "answers": ["a", "b"]}, "'answers' of row 0 .* must be a list of dicts with 'answer', 'rank'"),
        ({"prompt": "p", "answers": [{"answer": "a", "rank": "best"}]}, "a rank of row 0 .* is 'best'"),
        ({"prompt": {"role": "judge", "text": "a"}}, "a message of row 0 .* has the role 'judge'"),
        ({"prompt": "p", "completion": "a", "label": True}, "row 0 .* it needs 'chosen' and 'rejected'"),
    ],
)
def test_other_forms_are_checked_as_well(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences([row])


def test_columns_that_nothing_reads_may_be_anything() -> None:
    row = {**GOOD, "score_chosen": None, "messages": [None], "source": float("nan")}
    [pair] = load_preferences([row])
    assert (pair["chosen"], pair["rejected"]) == (" Yes.", " No.")
