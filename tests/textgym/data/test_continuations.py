"""A completion is the continuation of its prompt, as text and as ids: for any text, tokenizer and cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.data.completions import encode_completions, shorten
from textgym.data.continuations import decode_continuation, encode_after, encode_continuations, ids_of_text
from textgym.data.encoding import encode
from textgym.testing import byte_tokenizer
from textgym.testing.small_tokenizers import SMALL, byte_level, sentencepiece, unigram

TOKENIZERS = {**SMALL, "bytes": byte_tokenizer}
LOSSY = [
    "sentencepiece unigram",
    "WordPiece",
    "BertTokenizer",
    "T5Tokenizer",
    "characters",
    "Qwen2Tokenizer with added tokens",
]
LOSSLESS = [name for name in TOKENIZERS if name not in LOSSY]  # these can say every text
ONE_FIRST_SPACE = ["sentencepiece BPE with BOS", "LlamaTokenizer"]
"""To these a text is the same with and without a space before it."""
TEXTS = st.text(
    st.one_of(st.sampled_from("This film is a joy.\n \u00e9\U0001f600\ufffd<s>|"), st.characters(codec="utf-8"))
)
SLOWLY = settings(deadline=None, max_examples=12)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_completion_keeps_its_first_space(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    prompt, completion = encode_continuations(tokenizer, [("this film is", " a joy.")])[0]
    assert decode_continuation(tokenizer, prompt, completion) == " a joy."


@pytest.mark.parametrize("name", TOKENIZERS)
@SLOWLY
@given(prompt=TEXTS, completion=TEXTS)
def test_ids_are_those_of_the_whole_text_split_where_the_prompt_ends(name: str, prompt: str, completion: str) -> None:
    tokenizer = TOKENIZERS[name]()
    first, second = encode_continuations(tokenizer, [(prompt, completion)])[0]
    assert first + second == encode([prompt + completion], tokenizer)[0]
    if name in LOSSLESS and not (prompt + completion).startswith(tuple(tokenizer.all_special_tokens)):
        shown = decoded(tokenizer, first).rstrip("\ufffd")
        said = prompt.removeprefix(" ") if name in ONE_FIRST_SPACE else prompt
        assert said.startswith(shown.removeprefix(" " if "prefix space" in name else ""))


@pytest.mark.parametrize("name", TOKENIZERS)
@SLOWLY
@given(text=TEXTS, data=st.data())
def test_prompt_and_decoded_completion_make_up_the_decoded_text(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = encode([text], tokenizer)[0]
    cut = data.draw(st.integers(0, len(ids)))
    whole, before = decoded(tokenizer, ids), decoded(tokenizer, ids[:cut])
    added = decode_continuation(tokenizer, ids[:cut], ids[cut:])
    assert whole.endswith(added)
    if whole.startswith(before):
        assert before + added == whole


@pytest.mark.parametrize("name", LOSSLESS)
@SLOWLY
@given(text=TEXTS)
def test_no_beginning_of_a_completion_shows_a_part_of_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = text.replace("\ufffd", "")  # the character that stands for a part of one, which may stand before a part
    prompt, completion = encode_continuations(tokenizer, [("It is", " " + text)])[0]
    for length in range(len(completion) + 1):
        shown = decode_continuation(tokenizer, prompt, completion[:length])
        assert (" " + text).startswith(shown), (shown, completion[:length])


@pytest.mark.parametrize("name", LOSSLESS)
@SLOWLY
@given(context=TEXTS, text=TEXTS)
def test_a_text_that_is_appended_to_ids_reads_as_it_is(name: str, context: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = encode([f"It is {context}"], tokenizer)[0]
    text = text.replace("<s>", "")  # a reply that begins with a control token was rendered
    assert decode_continuation(tokenizer, ids, encode_after(tokenizer, ids, text)) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_token_is_not_part_of_the_ids_of_a_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    prompt, completion = encode_continuations(tokenizer, [("this film is", " a joy.")])[0]
    text = decode_continuation(tokenizer, prompt, completion)
    eos = tokenizer.eos_token_id
    assert ids_of_text(tokenizer, prompt, [*completion, eos], text) == completion
    assert ids_of_text(tokenizer, prompt, [*completion, completion[0]], text) == completion
    assert ids_of_text(tokenizer, prompt, [eos], "") == []


def test_a_token_that_a_text_cuts_has_other_ids() -> None:
    tokenizer = byte_level()
    prompt, completion = encode_continuations(tokenizer, [("This film is", " a joy.")])[0]
    ids = ids_of_text(tokenizer, prompt, completion, " a jo")
    assert ids[:1] == completion[:1]
    assert decode_continuation(tokenizer, prompt, ids) == " a jo"


# Examples for training


def test_examples_have_the_ids_of_the_whole_text() -> None:
    for tokenizer in (sentencepiece(), byte_level(), unigram()):
        [example] = encode_completions([("This film is", " a joy.")], tokenizer)
        whole = encode(["This film is a joy."], tokenizer)[0]
        assert [*example.prompt, *example.completion] == [*whole, tokenizer.eos_token_id]
        [example] = encode_completions([("This film is ", "a joy.")], tokenizer)
        assert [*example.prompt, *example.completion] == [*whole, tokenizer.eos_token_id]
        assert decoded(tokenizer, example.prompt).strip() == "This film is"


def test_a_completion_may_end_with_eos_and_spells_it_elsewhere() -> None:
    tokenizer = byte_tokenizer()
    [ended, spelled] = encode_completions([("a", "b<eos>"), ("a", "b<eos>c")], tokenizer)
    assert ended.completion == [98, 256]
    assert spelled.completion == [98, *b"<eos>", 99, 256]


def test_conversations_have_the_ids_of_the_whole_rendering() -> None:
    ask = [{"role": "user", "content": "Is <|im_end|> a token?"}]
    answer = [{"role": "assistant", "content": "It is <|im_start|>."}]
    for tokenizer in (byte_level(), sentencepiece()):
        [example] = encode_completions([(ask, answer)], tokenizer)
        rendered = tokenizer.apply_chat_template([*ask, *answer], tokenize=False)
        end = tokenizer.eos_token if tokenizer.eos_token in rendered else "<|im_end|>\n" + tokenizer.eos_token
        text = tokenizer.decode([*example.prompt, *example.completion])
        assert text == rendered.removesuffix("<|im_end|>\n").removesuffix(tokenizer.eos_token) + end
        assert example.prompt == encode([ask], tokenizer, add_generation_prompt=True)[0]


def test_bos_stays_when_examples_are_shortened() -> None:
    [example] = shorten([[1, 5, 6, 7]], [[8, 9]], max_length=4, bos=1)
    assert example == ([1, 7], [8, 9])
