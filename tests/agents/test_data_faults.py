"""Data that SFT and DPO would learn nothing from, or something else: counted, said, and refused above a share."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from textgym.agents import DPO, SFT, DPOConfig, SFTConfig
from textgym.errors import DataError, DataWarning
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EXAMPLES = [{"prompt": f"Film {i} is", "completion": f" good {i}"} for i in range(10)]
PAIRS = [{"prompt": f"Film {i} is", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(10)]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def sft(rows: Any, template: str | None = None, **settings: Any) -> SFT:
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1))
    return SFT(policy, rows, tokenizer_with(template), SFTConfig(**settings))


def dpo(rows: Any, template: str | None = None, **settings: Any) -> DPO:
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1))
    return DPO(policy, rows, tokenizer_with(template), DPOConfig(**settings))


def texts_of(agent: Any) -> list[tuple[str, str]]:
    decode = agent.tokenizer.decode
    return [(decode(text.prompt), decode(text.completion)) for text in agent.texts]


def changed(rows: list[dict[str, Any]], row: int, **change: Any) -> list[dict[str, Any]]:
    return [{**columns, **change} if index == row else columns for index, columns in enumerate(rows)]


@pytest.mark.parametrize(
    ("make", "rows", "settings", "message"),
    [
        (sft, changed(EXAMPLES, 4, prompt="so " * 40), {"max_length": 60}, "1 of 10 examples lose the beginning of"),
        (sft, changed(EXAMPLES, 4, completion="so " * 40), {"max_length": 60}, "1 of 10 examples lose their end token"),
        (sft, changed(EXAMPLES, 4, prompt="  "), {}, "1 of 10 examples have an empty prompt"),
        (sft, changed(EXAMPLES, 4, completion=""), {}, "1 of 10 examples have an empty completion"),
        (sft, changed(EXAMPLES, 4, completion="Film 4 is good"), {}, "1 of 10 examples repeat their prompt in the com"),
        (dpo, changed(PAIRS, 4, rejected=" good 4"), {}, "1 of 10 preferences have two sides that are equal"),
        (dpo, changed(PAIRS, 4, prompt="so " * 40), {"max_length": 60}, "1 of 10 preferences lose the beginning of"),
        (dpo, changed(PAIRS, 4, rejected="so " * 40), {"max_length": 60}, "1 of 10 preferences lose their end token"),
        (dpo, changed(PAIRS, 4, chosen=" "), {}, "1 of 10 preferences have an empty completion"),
        (dpo, changed(PAIRS, 4, chosen="Film 4 is good"), {}, "1 of 10 preferences repeat their prompt in the com"),
    ],
)
def test_faults_are_counted_refused_and_allowed(make: Any, rows: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"{message}.* \(first: row 4 of .*allow_faulty_rows"):
        make(rows, **settings)
    with pytest.warns(DataWarning, match=message) as caught:
        make(rows, allow_faulty_rows=0.1, **settings)
    assert len(caught) == 1, "said once"
    assert caught[0].filename == __file__, "and of the caller's line"


def test_pairs_that_are_equal_after_they_are_cut() -> None:
    pairs = [
        {"prompt": "Say", "chosen": f" the same for long, then {i}", "rejected": " the same for long, no"}
        for i in range(16)
    ]
    with pytest.raises(DataError, match="16 of 16 preferences have two sides that are equal to the model"):
        dpo(pairs, max_length=16)


def test_a_long_completion_leaves_a_quarter_of_the_length_to_the_prompt() -> None:
    rows = [{"prompt": "0123456789" * 3, "completion": "x" * 60}]
    with pytest.warns(DataWarning, match="lose the beginning of their prompt"):
        agent = sft(rows, max_length=40, allow_faulty_rows=1.0)
    assert texts_of(agent) == [("0123456789", "x" * 30)]


def test_repeated_rows_are_said_and_trained_on() -> None:
    with pytest.warns(DataWarning, match="10 of 20 examples are duplicates .first: row 10 of the examples."):
        agent = sft(EXAMPLES * 2)
    assert len(agent) == 20


def test_prompts_that_run_into_their_completions_are_said() -> None:
    message = "10 of 10 {} have no white space between prompt and completion"
    with pytest.warns(DataWarning, match=message.format("examples")):
        sft([{**row, "completion": row["completion"].strip()} for row in EXAMPLES])
    with pytest.warns(DataWarning, match=message.format("preferences")):
        dpo([{**row, "rejected": row["rejected"].strip()} for row in PAIRS])


def test_good_data_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sft(EXAMPLES)
        dpo(PAIRS)
        sft([{"text": "All of it."}, {"text": "And more."}])


def test_a_row_of_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", json.dumps(EXAMPLES[0]), "", json.dumps({"prompt": "a", "completion": ""})]))
    with pytest.raises(DataError, match=r"1 of 2 examples have an empty completion \(first: line 4 of '.*rows.jsonl'"):
        sft(path)
    path.write_text(
        "\n".join(
            ["", json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})]
        )
    )
    with pytest.raises(DataError, match=r"line 2 of '.*rows.jsonl': the tokenizer '' has no chat template"):
        sft(path)


def test_a_mixture_of_forms_with_none_for_missing_columns() -> None:
    columns = dict.fromkeys(("prompt", "completion", "messages", "text"))
    talk = [
        {"role": "user", "content": "2+2", "name": None},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]
    rows = [{**columns, "prompt": "2+2=", "completion": "4"}, {**columns, "messages": talk}, {**columns, "text": "abc"}]
    assert texts_of(sft(rows, CHAT)) == [
        ("2+2=", "4<eos>"),
        ("<user>2+2<eos>\n<assistant>", "4<eos>"),
        ("a", "bc<eos>"),
    ]


@pytest.mark.parametrize("prompt", ["2+2", [{"role": "user", "content": "2+2"}]])
def test_whole_conversations_beside_a_prompt_are_read_once(prompt: Any) -> None:
    user, four, five = {"role": "user", "content": "2+2"}, *({"role": "assistant", "content": text} for text in "45")
    asked = "<user>2+2<eos>\n<assistant>"
    assert texts_of(sft([{"prompt": prompt, "completion": [user, four]}], CHAT)) == [(asked, "4<eos>")]
    assert texts_of(dpo([{"prompt": prompt, "chosen": [user, four], "rejected": [user, five]}], CHAT)) == [
        (asked, "4<eos>"),
        (asked, "5<eos>"),
    ]


def test_ties_count_half_in_the_accuracy_of_dpo() -> None:
    agent = dpo(PAIRS)
    sums = torch.tensor([[0.0], [0.0], [-1.0], [-2.0]])  # a tie, and two pairs in order
    batch = {
        "reference": torch.zeros(4),
        "response_lengths": torch.ones(4),
        "chosen": torch.tensor([0, 0, 2]),
        "rejected": torch.tensor([1, 2, 3]),
        "probability": torch.ones(3),
    }
    _, metrics = agent.loss(sums, torch.zeros_like(sums), batch)
    assert float(metrics["rewards/accuracies"]) == pytest.approx(2.5 / 3)
