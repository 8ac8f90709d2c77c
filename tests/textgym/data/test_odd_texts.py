"""Texts that tokenizers find hard: half characters, control characters, a megabyte, one row, right-to-left."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from textgym import train_reward_model
from textgym.agents import DPO, SFT, DPOConfig, SFTConfig
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.models import RewardModel
from textgym.testing import byte_tokenizer, mock_lm

HALF = "one \ud83d two"


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def make_env(prompt: Any, **changes: Any) -> Any:
    return gym.make("textgym/Text-v0", prompts=[prompt], tokenizer="tiny", reward=length, max_new_tokens=2, **changes)


def sft(text: str) -> None:
    rows = [{"prompt": text, "completion": " c"}]
    SFT(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), SFTConfig(max_steps=1)).learn()


def dpo(text: str) -> None:
    rows = [{"prompt": "a", "chosen": text, "rejected": "d"}]
    DPO(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), DPOConfig(max_steps=1)).learn()


def trained_reward_model(text: str) -> None:
    train_reward_model([{"prompt": "a", "chosen": text, "rejected": "d"}] * 2)


def reward_model(text: str) -> None:
    RewardModel.from_pretrained("tiny")(prompts=["a"], completions=[text])


@pytest.mark.parametrize("use", [make_env, sft, dpo, trained_reward_model, reward_model])
def test_a_lone_surrogate_is_named(use: Any) -> None:
    with pytest.raises(ValueError, match=r"has the lone surrogate '\\ud83d' at character \d+, .*remove it, or replace"):
        use(HALF)


@pytest.mark.filterwarnings("ignore:.*prompt.*tokens:UserWarning")
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\x00\x01\x1b[31m\x7f", id="control characters"),
        pytest.param("\u202e\u05e9\u05dc\u05d5\u05dd\u202c \u0627\u0644", id="right to left"),
        pytest.param("\U0001f469\u200d\U0001f467 e\u0301", id="joined"),
        pytest.param("\ufffd", id="replacement"),
        pytest.param("a" * 2**20, id="1 MB", marks=pytest.mark.slow),
    ],
)
def test_any_other_text_is_a_prompt(text: str) -> None:
    env = make_env(text)
    env.reset(seed=0)
    env.step(5)
    _, reward, terminated, _, info = env.step(6)
    assert terminated
    assert info["score"] == reward == len(env.unwrapped.transcript["completion"])
    assert env.unwrapped.transcript["prompt"] == text
