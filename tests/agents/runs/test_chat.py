"""chat: completions of what is typed, with their scores, or without where there can be none."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from textgym.agents.runs.chat import chat
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def answers(lines: list[str], reward: Any, prompts: list[Any]) -> list[str]:
    policy = ActorCritic.from_pretrained(mock_lm())
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=1,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        reward=reward,
        on_reward_error="skip",
        kl_mode="deferred",
        max_new_tokens=4,
    )
    said: list[str] = []
    chat(policy, envs, policy, lines, said.append)
    return said


def test_every_line_is_answered_with_its_score() -> None:
    said = answers(["one\n", "\n", "  \n", "a much longer prompt than before\n", "one\n"], length, ["x"])
    assert len(said) == 6, "empty lines are skipped"
    for text, figures in zip(said[::2], said[1::2], strict=True):
        assert figures.startswith(f"  [score {len(text):+.3f}, KL ")
        assert figures.endswith(" nats, 4 tokens]") or "tokens]" in figures
    assert said[0] != said[4], "each turn samples anew"


def test_rewards_that_need_a_column_give_no_score() -> None:
    def same(completions: list[str], answer: list[str]) -> list[float]:
        return [float(text.startswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]

    with pytest.warns(UserWarning, match="reward function 'same' raised"):
        said = answers(["one\n"], same, [{"prompt": "x", "answer": "y"}])
    assert said[1].startswith("  [no score, KL ")
