"""Views in strings, windows and conversations."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.games import TurnActions
from textgym.testing import mock_lm, terms_of, tolerance
from textgym.wrappers import (
    ChatTemplate,
    TextObservation,
    TokenHistory,
    TopKActions,
    VectorTextObservation,
    VectorTokenHistory,
)

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
def test_text_so_far_and_at_the_end(settings: dict[str, Any]) -> None:
    env = TextObservation(TextEnv(**settings))
    envs = VectorTextObservation(TextVectorEnv(2, **settings, autoreset_mode="SameStep"))
    assert env.reset(options={"prompt_index": 0})[0] == "lo world", "what was cut the model does not see"
    assert envs.reset(options={"prompt_index": [0, 2]})[0] == ("lo world", "a")
    assert env.step(ord("!"))[0] == "lo world!"
    assert envs.step([ord("!"), ord("b")])[0] == ("lo world!", "ab")
    assert env.step(256)[0] == "lo world!<eos>"
    _, _, ended, _, infos = envs.step([256, ord("c")])
    assert (ended.tolist(), infos["final_obs"].tolist()) == ([True, False], ["lo world!<eos>", None])
    check_env(env, skip_render_check=True)


def test_a_turn_is_the_sum_of_its_tokens(settings: dict[str, Any]) -> None:
    plain, env = TextEnv(**settings), TurnActions(TextObservation(TextEnv(**settings)))
    plain.reset(options={"prompt_index": 2})
    rewards = [plain.step(token)[1] for token in (ord("h"), ord("i"), 256)]
    env.reset(options={"prompt_index": 2})
    observation, reward, terminated, truncated, info = env.step("hi")
    assert (observation, terminated, truncated, info["response_tokens"]) == ("ahi<eos>", True, False, 3)
    assert reward == pytest.approx(sum(rewards), abs=ROUNDING)
    env.reset(options={"prompt_index": 2})
    assert env.step("too long a turn")[0] == "atoo l", "the length limit ends it"


def test_a_turn_before_the_end_is_allowed(settings: dict[str, Any]) -> None:
    env = TurnActions(TextObservation(TextEnv(**{**settings, "min_new_tokens": 3})))
    env.reset(options={"prompt_index": 2})
    with pytest.raises(ValueError, match="pass a longer reply"):
        env.step("")
    assert env.step("b")[:1] + env.step("cd")[2:3] == ("ab", True)
    with pytest.raises(ValueError, match="whose actions are tokens"):
        TurnActions(TopKActions(TextEnv(**settings), 2))


def test_turns_of_many_rows(settings: dict[str, Any]) -> None:
    envs = SyncVectorEnv([lambda: TurnActions(TextObservation(TextEnv(**settings)))] * 2)
    envs.reset(seed=0)
    observations, _, terminated, _, _ = envs.step(("b", "cdefgh"))
    assert observations[0].endswith("b<eos>")
    assert observations[1].endswith("cdefg")
    assert terminated.all()


@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_window_ends_with_the_newest_token(settings: dict[str, Any], array: str) -> None:
    env, envs = TokenHistory(TextEnv(**settings), 3), VectorTokenHistory(TextVectorEnv(2, **settings, array=array), 3)
    observation, _ = env.reset(options={"prompt_index": 2})
    assert observation["input_ids"].tolist() == [257, 257, ord("a")]
    assert observation["attention_mask"].tolist() == [0, 0, 1]
    envs.reset(options={"prompt_index": [2, 3]})
    for token in (257, 98, 99):  # the padding token may be written: the mask says that it was
        observation, seen = env.step(token)[0], envs.step([token, token])[0]
        assert env.observation_space.contains(observation)
        np.testing.assert_array_equal(torch.as_tensor(seen["input_ids"])[0], observation["input_ids"])
        np.testing.assert_array_equal(torch.as_tensor(seen["attention_mask"])[0], observation["attention_mask"])
    assert (observation["input_ids"].tolist(), observation["attention_mask"].tolist()) == ([257, 98, 99], [1, 1, 1])
    with pytest.raises(ValueError, match="at least 1"):
        TokenHistory(TextEnv(**settings), 0)


def test_chat_template_reaches_model_and_reward(settings: dict[str, Any]) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        seen.extend([prompts[0], completions[0]])
        return [0.0]

    settings["tokenizer"].chat_template = TEMPLATE
    prompts = ["Hi", {"prompt": [{"role": "user", "content": "Yo"}]}]
    env = gym.make("textgym/Text-v0", **{**settings, "prompts": prompts, "reward": reward, "max_prompt_tokens": 20})
    view = TextObservation(ChatTemplate(env, system="Be"))
    assert view.reset(options={"prompt_index": 1})[0] == "<s>Be<u>Yo<a>"
    assert view.reset(options={"prompt_index": 0})[0] == "<s>Be<u>Hi<a>"
    view.step(ord("b"))
    view.step(256)
    assert seen[0] == [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]
    assert seen[1] == [{"role": "assistant", "content": "b"}]
    settings["tokenizer"].chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate(TextEnv(**settings))
