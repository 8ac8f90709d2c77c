"""Random data sets, in any mixture of forms: what a model reads is the text that was meant, or the row is named."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from textgym.agents import DPO, SFT, DPOConfig, SFTConfig
from textgym.data.completions import Reading, placed_examples, read_examples, read_pairs
from textgym.data.preferences import placed_preferences
from textgym.errors import DataError
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.models import RewardModel, RewardModelConfig, train_reward_model
from textgym.rewards.models.training import read_rated_pairs
from textgym.testing import byte_tokenizer, mock_lm

Row = dict[str, Any]
TOKENIZER = byte_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
READING = Reading(TOKENIZER, max_length=10_000)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

words = st.text("abc é?.", min_size=1, max_size=8).map(str.strip).filter(bool)
prompts = st.tuples(words, words).map(" ".join)


@functools.cache
def scorer() -> RewardModel:
    model = AutoModelForSequenceClassification.from_config(mock_lm(num_layers=1, num_labels=1).config)
    return RewardModel(model, TOKENIZER, max_length=100)


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def said(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def strings(prompt: str, *answers: str) -> list[str]:
    return [f"{prompt} {answer}<eos>" for answer in answers]


def talks(prompt: str, *answers: str) -> list[str]:
    return [f"<user>{prompt}<eos><assistant>{answer}<eos>" for answer in answers]


def chat(prompt: str, *answers: str) -> list[list[Row]]:
    return [[user(prompt), said(answer)] for answer in answers]


def in_parts(text: str) -> list[Row]:
    return [{"type": "text", "text": text[:1], "image": None}, {"type": "text", "text": text[1:]}]


PAIR_FORMS = {
    "strings": (lambda p, a, b: {"prompt": p, "chosen": f" {a}", "rejected": f" {b}"}, strings),
    "whole strings": (lambda p, a, b: {"prompt": p, "chosen": f"{p} {a}", "rejected": f"{p} {b}"}, strings),
    "messages": (lambda p, a, b: {"prompt": [user(p)], "chosen": [said(a)], "rejected": [said(b)]}, talks),
    "mixed": (lambda p, a, b: {"prompt": [user(p)], "chosen": [said(a)], "rejected": b}, talks),
    "H4": (lambda p, a, b: {"prompt": p, "chosen": chat(p, a)[0], "rejected": chat(p, b)[0]}, talks),
    "whole": (lambda p, a, b: {"prompt": None, "chosen": chat(p, a)[0], "rejected": chat(p, b)[0]}, talks),
    "parts": (
        lambda p, a, b: {"chosen": [user(in_parts(p)), said(a)], "rejected": [user(p), said(in_parts(b))]},
        talks,
    ),
    "SHP": (lambda p, a, b: {"history": p, "human_ref_A": b, "human_ref_B": a, "labels": 0}, talks),
    "ranked": (
        lambda p, a, b: {"prompt": p, "answers": [{"answer": f" {b}", "rank": 2}, {"answer": f" {a}", "rank": 1}]},
        strings,
    ),
}
EXAMPLE_FORMS = {
    "strings": (lambda p, a: {"prompt": p, "completion": f" {a}"}, strings),
    "messages": (lambda p, a: {"messages": chat(p, a)[0], "prompt": p}, talks),
    "apart": (lambda p, a: {"prompt": [user(p)], "completion": [said(a)]}, talks),
    "whole": (lambda p, a: {"prompt": p, "completion": chat(p, a)[0]}, talks),
    "text": (lambda p, a: {"text": f"{p} {a}", "prompt": None, "completion": None, "messages": None}, strings),
    "parts": (lambda p, a: {"messages": [user(in_parts(p)), said(a)]}, talks),
}
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "margin": st.none() | st.floats(-9, 9),
        "probability": st.none() | st.floats(0, 1),
        "group": st.none() | st.integers(0, 2) | st.sampled_from("xy"),
        "score_chosen": st.none() | st.just(math.nan),
    },
)
BREAKS: list[Row] = [
    {"margin": math.nan},
    {"margin": "large"},
    {"probability": 2},
    {"probability": [1.0]},
    {"group": ["a"]},
    {"prompt": math.nan},
    {"chosen": 3, "rejected": "b"},
    {"chosen": ["a"], "rejected": ["b"]},
    {"chosen": [said([{"type": "image"}])], "rejected": "b"},
    {"chosen": "\ud83d", "rejected": "b"},
    {"prompt": "another one", "chosen": chat("a b", "c")[0], "rejected": chat("a b", "d")[0]},
    {"prompt": [user("a")], "chosen": chat("a", "b")[0], "rejected": [said("c")]},
]


@st.composite
def preferences(draw: st.DrawFn) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows, and the two texts that are meant by each."""
    rows, meant = [], []
    for prompt, name in draw(st.lists(st.tuples(prompts, st.sampled_from(sorted(PAIR_FORMS))), min_size=1, max_size=6)):
        chosen, rejected = draw(st.lists(words, min_size=2, max_size=2, unique=True))
        make, text = PAIR_FORMS[name]
        rows.append({**make(prompt, chosen, rejected), **draw(EXTRAS)})
        meant.append(tuple(text(prompt, chosen, rejected)))
    return rows, meant


def decoded(ids: Any) -> str:
    return str(TOKENIZER.decode(list(ids)))


@SETTINGS
@given(preferences())
def test_dpo_and_reward_models_read_what_is_meant(data: tuple[list[Row], list[tuple[str, str]]]) -> None:
    rows, meant = data
    before = copy.deepcopy(rows)
    placed = placed_preferences(rows)
    pairs, faults = read_pairs(placed, READING)
    assert [tuple(decoded([*text.prompt, *text.completion]) for text in pair) for pair in pairs] == meant
    rated, others = read_rated_pairs(placed, scorer(), RewardModelConfig())
    assert [(decoded(pair.chosen), decoded(pair.rejected)) for pair in rated] == meant
    in_use = [scorer().text(row.pair["prompt"], row.pair["chosen"]) for row in placed]
    assert scorer().encode(in_use) == [list(pair.chosen) for pair in rated], "as it reads completions later"
    assert set(faults.places) | set(others.places) <= {"are duplicates"}
    assert repr(rows) == repr(before), "the caller's rows are left as they are"


@SETTINGS
@given(preferences(), st.sampled_from(BREAKS), st.integers(0, 5))
def test_a_row_that_cannot_be_read_is_named(
    data: tuple[list[Row], list[tuple[str, str]]], broken: Row, place: int
) -> None:
    rows = [*data[0]]
    place = min(place, len(rows))
    rows.insert(place, {"prompt": "a b", "chosen": "c", "rejected": "d", **broken})
    with pytest.raises(DataError, match=rf"row {place} of the preferences"):
        placed_preferences(rows)


@SETTINGS
@given(st.lists(st.tuples(prompts, words, st.sampled_from(sorted(EXAMPLE_FORMS))), min_size=1, max_size=6))
def test_sft_reads_what_is_meant(drawn: list[tuple[str, str, str]]) -> None:
    rows = [EXAMPLE_FORMS[form][0](prompt, answer) for prompt, answer, form in drawn]
    meant = [EXAMPLE_FORMS[form][1](prompt, answer)[0] for prompt, answer, form in drawn]
    texts, faults = read_examples(placed_examples(rows), READING)
    assert [decoded([*text.prompt, *text.completion]) for text in texts] == meant
    for text, (prompt, answer, form) in zip(texts, drawn, strict=True):
        if form != "text":
            assert decoded(text.completion) in (f"{answer}<eos>", f" {answer}<eos>")
            assert prompt in decoded(text.prompt)
    assert set(faults.places) <= {"are duplicates"}


@SETTINGS
@given(preferences(), st.integers(8, 40))
def test_cut_texts_are_counted_row_by_row(data: tuple[list[Row], list[tuple[str, str]]], max_length: int) -> None:
    rows, meant = data
    pairs, faults = read_pairs(placed_preferences(rows), Reading(TOKENIZER, max_length))
    for row, (pair, texts) in enumerate(zip(pairs, meant, strict=True)):
        lengths = [len(text.prompt) + len(text.completion) for text in pair]
        assert max(lengths) <= max_length
        whole = [decoded([*text.prompt, *text.completion]) for text in pair] == list(texts)
        named = {fault for fault, places in faults.places.items() if f"row {row} of the preferences" in places}
        cuts = named & {"lose the beginning of their prompt", "lose their end token"}
        assert bool(cuts) != whole
        assert ("have two sides that are equal to the model" in named) == (pair[0] == pair[1])


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=preferences(), choice=st.sampled_from([{}, {"use_probability": True}]))
def test_training_on_any_data_gives_finite_weights_or_names_what_is_wrong(
    data: tuple[list[Row], list[tuple[str, str]]], choice: dict[str, bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, _ = data
    folder = tmp_path_factory.mktemp("lm")
    mock_lm(num_layers=1).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    lacks = bool(choice) and any(row.get("probability") is None for row in rows)
    runs = [
        lambda: (
            DPO(ActorCritic.from_pretrained(folder), rows, TOKENIZER, DPOConfig(batch_size=2, **choice)).learn().policy
        ),
        lambda: train_reward_model(rows, folder, config=RewardModelConfig(**choice), heldout=[])[0].model,
    ]
    for run in runs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if lacks:
                with pytest.raises(DataError, match="needs a 'probability' in every preference"):
                    run()
                continue
            assert all(torch.isfinite(weight).all() for weight in run().parameters())


@pytest.mark.slow
def test_sft_trains_on_every_form_at_once() -> None:
    rows = [make("What is it?", f"answer {i}") for i, (make, _) in enumerate(EXAMPLE_FORMS.values())]
    agent = SFT(ActorCritic.from_pretrained(mock_lm(num_layers=1)), rows, TOKENIZER, SFTConfig(batch_size=2)).learn()
    assert agent.updates == 3
