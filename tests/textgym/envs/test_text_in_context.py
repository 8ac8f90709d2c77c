"""Prompts, responses and stop strings as text: with tokenizers that need the context to decode a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from textgym.data.continuations import encode_continuations
from textgym.envs.prompt_ids import padded_prompts
from textgym.envs.stopping import StopStrings
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.errors import CutPromptsWarning
from textgym.rewards.models import RewardModel
from textgym.testing import byte_tokenizer, mock_lm
from textgym.testing.small_tokenizers import SMALL, byte_level, sentencepiece

ASK = [{"role": "user", "content": "What is a film?"}]


def play(env: TextEnv, tokens: list[int]) -> tuple[dict[str, Any], int]:
    """The last info of an episode, and the number of tokens that it took."""
    env.reset(options={"prompt_index": 0})
    for step, token in enumerate(tokens, start=1):
        *_, terminated, _, info = env.step(token)
        if terminated:
            return info, step
    raise AssertionError("the episode goes on")


def make_env(tokenizer: Any, prompt: Any = "This film is", **settings: Any) -> TextEnv:
    reward: Callable[..., list[float]] = settings.pop("reward", lambda completions: [0.0] * len(completions))
    return TextEnv(
        [{"prompt": prompt}], tokenizer, reward, **{"max_new_tokens": 12, "max_prompt_tokens": 24, **settings}
    )


def continuation(tokenizer: Any, completion: str, prompt: str = "This film is") -> list[int]:
    return encode_continuations(tokenizer, [(prompt, completion)])[0].completion


@pytest.mark.parametrize("name", SMALL)
def test_rewards_and_transcripts_have_the_first_space_of_a_completion(name: str) -> None:
    tokenizer = SMALL[name]()
    seen: list[str] = []

    def reward(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [0.0]

    env = make_env(tokenizer, reward=reward)
    play(env, [*continuation(tokenizer, " a joy."), tokenizer.eos_token_id])
    assert seen == [" a joy."]
    assert env.transcript["completion"] == " a joy."


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("stop", [". ", " is", "joy"])
def test_a_stop_string_ends_the_row_where_it_is_complete(name: str, stop: str) -> None:
    tokenizer = SMALL[name]()
    tokens = continuation(tokenizer, " a joy. it is good. this film is a joy.")
    env = make_env(tokenizer, stop=[stop], max_new_tokens=len(tokens))
    info, _ = play(env, tokens)
    assert info["ended_by_stop"]
    text = " a joy. it is good. this film is a joy."
    assert env.transcript["completion"] == text[: text.index(stop)]


def test_stop_strings_need_no_time_for_the_vocabulary() -> None:
    decoded: list[Any] = []

    class Counting:
        def __init__(self) -> None:
            self.inner = byte_level()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

        def decode(self, ids: Any, **kwargs: Any) -> str:
            decoded.append(ids)
            return str(self.inner.decode(ids, **kwargs))

    strings = StopStrings(["."], Counting())
    assert not decoded
    token = byte_level()(".").input_ids[0]
    other = byte_level()("a").input_ids[0]
    for _ in range(3):
        assert strings.can_complete(np.array([token, other, token])).tolist() == [True, False, True]
    assert len(decoded) == 4, "each token is decoded once, after another one"


def test_which_tokens_complete_a_stop_string_does_not_depend_on_those_seen_before() -> None:
    strings = StopStrings(["c", "f"], byte_tokenizer())
    seen = []
    for token in b"abcdef":  # each is the largest so far
        seen.append(token)
        assert strings.can_complete(np.array(seen)).tolist() == [chr(earlier) in "cf" for earlier in seen]


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_end|>\n"])
def test_a_stop_string_that_is_a_special_token_means_the_token(stop: str) -> None:
    tokenizer = byte_level()
    env = make_env(tokenizer, stop=[stop])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    info, steps = play(env, [*continuation(tokenizer, " a joy"), end, 7, 7])
    assert info["ended_by_stop"]
    assert steps == len(continuation(tokenizer, " a joy")) + 1
    assert env.transcript["completion"] == " a joy"


def test_a_part_of_a_character_is_shown_to_neither_stop_strings_nor_rewards() -> None:
    tokenizer = byte_tokenizer()
    env = make_env(tokenizer, stop=["\ufffd"], max_new_tokens=6)
    info, steps = play(env, [*b" ok", *"\U0001f600".encode()[:3]])
    assert (info["ended_by_stop"], steps, env.transcript["completion"]) == (False, 6, " ok")


# Prompts


def test_prompts_have_one_bos_and_no_eos_and_add_special_tokens_switches_it_off() -> None:
    tokenizer = sentencepiece()
    rendered = tokenizer.apply_chat_template(ASK, tokenize=False)
    for prompt in (ASK, rendered, "A film"):
        env = make_env(tokenizer, prompt)
        observation, _ = env.reset()
        ids = observation["input_ids"][observation["attention_mask"] == 1].tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
    observation, _ = make_env(tokenizer, "A film", add_special_tokens=False).reset()
    assert tokenizer.bos_token_id not in observation["input_ids"][observation["attention_mask"] == 1]


def test_prompts_that_spell_control_tokens_are_text() -> None:
    tokenizer = byte_tokenizer()
    observation, _ = make_env(tokenizer, "Is <eos> a token?").reset()
    assert bytes(observation["input_ids"][observation["attention_mask"] == 1].tolist()) == b"Is <eos> a token?"
    observation, _ = make_env(tokenizer, "Is <eos> a token?", add_special_tokens=False).reset()
    assert observation["input_ids"][3] == tokenizer.eos_token_id


def test_prompts_are_as_long_as_they_are_unless_a_model_or_a_limit_is_shorter() -> None:
    tokenizer = byte_tokenizer()
    env = TextEnv(["x" * 300, "y"], tokenizer, lambda completions: [0.0], max_new_tokens=4)
    observation, _ = env.reset(options={"prompt_index": 0})
    assert observation["input_ids"].shape == (304,)
    assert observation["attention_mask"].sum() == 300
    with pytest.warns(CutPromptsWarning, match="1 of 2 prompts .* lose 176 tokens .* raise max_prompt_tokens"):
        env = TextEnv(["x" * 300, "y"], tokenizer, lambda completions: [0.0], max_new_tokens=4, reference=mock_lm())
    assert env.observation_space["input_ids"].shape == (128,), "as many as the reference has positions"


def test_cut_prompts_are_counted_in_a_warning_and_keep_bos_and_their_end() -> None:
    tokenizer = sentencepiece()
    tokenizer_ids = tokenizer("This film is a joy. The actors are good.").input_ids
    prompts = ["This film is a joy. The actors are good.", "This film"]
    lost = len(tokenizer_ids) - 6
    with pytest.warns(CutPromptsWarning, match=f"1 of 2 prompts .* lose {lost} tokens"):
        envs = TextVectorEnv(2, prompts, tokenizer, lambda completions: [0.0], max_prompt_tokens=6, max_new_tokens=2)
    observation, _ = envs.reset(options={"prompt_index": [0, 1]})
    assert observation["input_ids"][0, :6].tolist() == [tokenizer.bos_token_id, *tokenizer_ids[-5:]]


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 \('b'\) has no tokens: give it some text"):
        padded_prompts([[1], [], [2, 3]], [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])


# What reward models read


def reward_model(vocab_size: int, tokenizer: Any) -> RewardModel:
    settings = mock_lm(vocab_size=vocab_size, num_labels=1).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RewardModel(AutoModelForSequenceClassification.from_config(settings), tokenizer)


@pytest.mark.parametrize("ending", ["eos", "stop id", "stop string", "part of a token", "length"])
def test_reward_models_read_the_same_whether_they_share_the_tokenizer_or_not(ending: str) -> None:
    tokenizer = sentencepiece()
    other = sentencepiece()
    shared, apart = reward_model(len(tokenizer), tokenizer), reward_model(len(tokenizer), other)
    tokens = continuation(tokenizer, " a joy. is it good")
    stop: dict[str, list[Any]] = {
        "eos": [],
        "stop id": [tokens[-1]],
        "stop string": [" good"],
        "part of a token": ["oo"],
        "length": [],
    }
    settings = {"stop": stop[ending], "max_new_tokens": len(tokens) + (ending == "eos")}
    env = make_env(tokenizer, reward=[shared, apart], **settings)
    apart.shared_ids = False  # as with a policy that has another tokenizer
    info, _ = play(env, [*tokens, tokenizer.eos_token_id])
    assert shared.shared_ids
    assert info["reward/reward_model"] == pytest.approx(info["reward/reward_model_2"], abs=1e-5)
    expected = apart.score_texts(["This film is" + env.transcript["completion"]])
    assert info["reward/reward_model"] == pytest.approx(expected.item(), abs=1e-5)
