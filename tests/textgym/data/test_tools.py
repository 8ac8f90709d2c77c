"""Tools: the template gets them apart from the messages, and only what the assistant says is learned."""

from __future__ import annotations

import json
import warnings
from typing import Any

import gymnasium as gym
import pytest

from textgym.data.completions import Reading, placed_examples, read_examples, read_pairs
from textgym.data.encoding import encode
from textgym.data.preferences import load_preferences, placed_preferences, text_of
from textgym.data.prompts import load_prompts
from textgym.errors import DataError, DataWarning
from textgym.testing import byte_tokenizer

MESSAGES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call {{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATE = "{% if tools %}{% for tool in tools %}<tool {{ tool | tojson }}>{% endfor %}{% endif %}" + MESSAGES
ADD: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
SHOWN = f"<tool {json.dumps(ADD)}>"
ASK = {"role": "user", "content": "1 + 2?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": [1, 2]}}}]}
RESULT = {"role": "tool", "content": "3"}
ANSWER = {"role": "assistant", "content": "It is 3."}
CALLED = '<assistant><call add {"a": [1, 2]}><eos>'


def tokenizer(template: str = TEMPLATE) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def learned(row: dict[str, Any], template: str = TEMPLATE) -> list[tuple[str, str]]:
    """The prompts and completions that SFT reads of a row."""
    reading = Reading(tokenizer(template), 1000)
    examples, _ = read_examples(placed_examples([row]), reading)
    return [(reading.tokenizer.decode(one.prompt), reading.tokenizer.decode(one.completion)) for one in examples]


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [{**ADD, "strict": None}], (ADD,)])
def test_the_template_shows_tools(tools: Any) -> None:
    expected = [(SHOWN + "<user>1 + 2?<assistant>", "It is 3.<eos>")]
    assert learned({"messages": [ASK, ANSWER], "tools": tools}) == expected
    assert learned({"prompt": [ASK], "completion": [ANSWER], "tools": tools}) == expected
    assert learned({"prompt": "1 + 2?", "completion": [ANSWER], "tools": tools}) == expected
    [row] = load_prompts([{"prompt": [ASK], "tools": tools}])
    reader = tokenizer()
    assert reader.decode(encode([row["prompt"]], reader, add_generation_prompt=True)[0]) == expected[0][0]
    [pair] = load_preferences([{"chosen": [ASK, ANSWER], "rejected": [ASK, CALL], "tools": tools}])
    assert reader.decode(encode([text_of(pair, "rejected")], reader)[0]) == SHOWN + "<user>1 + 2?" + CALLED


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert learned({"messages": [ASK, ANSWER], "tools": tools}) == [("<user>1 + 2?<assistant>", "It is 3.<eos>")]


def test_only_what_the_assistant_says_is_learned() -> None:
    """Results of tools, and what users say between answers, are context."""
    parts = learned({"prompt": [ASK], "completion": [CALL, RESULT, ANSWER], "tools": [ADD]})
    begin = SHOWN + "<user>1 + 2?"
    assert parts == [
        (begin + "<assistant>", CALLED.removeprefix("<assistant>")),
        (begin + CALLED + "<tool>3<assistant>", "It is 3.<eos>"),
    ]
    with pytest.raises(DataError, match="'completion' of row 0 of the examples has no message of the assistant"):
        learned({"prompt": [ASK], "completion": [RESULT]})


def test_pairs_in_which_others_take_turns_are_counted() -> None:
    row = {"prompt": [ASK], "chosen": [CALL, RESULT, ANSWER], "rejected": [ANSWER], "tools": [ADD]}
    _, faults = read_pairs(placed_preferences([row]), Reading(tokenizer(), 1000))
    with pytest.raises(DataError, match="have turns of others than the assistant in a completion"):
        faults.check(0.01)


@pytest.mark.parametrize("arguments", [{"a": [1, 2]}, '{"a": [1, 2]}'])
@pytest.mark.parametrize("written", ["call.function.arguments | tojson", "'' + call.function.arguments"])
def test_arguments_are_dicts_or_json_as_the_template_needs(arguments: Any, written: str) -> None:
    """Most templates write JSON, and some add strings to their text."""
    template = TEMPLATE.replace("call.function.arguments | tojson", written)
    call = {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    [(prompt, _)] = learned({"messages": [ASK, call, RESULT, ANSWER], "tools": [ADD]}, template)
    assert prompt == SHOWN + "<user>1 + 2?" + CALLED + "<tool>3<assistant>"


def test_a_template_that_ignores_tools_is_noticed() -> None:
    row = {"messages": [ASK, ANSWER], "tools": [ADD]}
    with pytest.warns(DataWarning, match="ignores tools, so the model does not read which there are"):
        assert learned(row, MESSAGES) == [("<user>1 + 2?<assistant>", "It is 3.<eos>")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        learned(row)
        learned({"messages": [ASK, ANSWER]}, MESSAGES)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("add", "is a string that is not JSON"),
        (["add"], r"must be a list of JSON schemas, each a dict, or a JSON string of such a list, got \['add'\]"),
        (ADD, "must be a list of JSON schemas"),
    ],
)
def test_what_is_no_list_of_schemas_is_refused(tools: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"'tools' of row 0 of the .*{message}"):
        placed_examples([{"messages": [ASK, ANSWER], "tools": tools}])
    with pytest.raises(DataError, match=message):
        load_prompts([{"prompt": [ASK], "tools": tools}])


def test_tools_of_strings_are_refused() -> None:
    for row in ({"prompt": "a", "completion": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}):
        load: Any = placed_examples if "completion" in row else placed_preferences
        with pytest.raises(DataError, match="has 'tools' and the text 'a': a chat template renders tools"):
            load([{**row, "tools": [ADD]}])


def test_episodes_begin_with_the_tools() -> None:
    reader = tokenizer()
    rows = [{"prompt": [ASK], "tools": [ADD]}]
    env = gym.make(
        "textgym/Text-v0", prompts=rows, tokenizer=reader, reward=lambda completions: [0.0], max_new_tokens=1
    )
    observation, _ = env.reset(seed=0)
    shown = reader.decode(observation["input_ids"][: int(observation["attention_mask"].sum())])
    assert shown == SHOWN + "<user>1 + 2?<assistant>"
