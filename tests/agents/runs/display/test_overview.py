"""overview: what a run is about to do, of prompts, data and games."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.agents.runs.display.overview import overview
from textgym.errors import CutPromptsWarning
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm


def prompts_of(prompts: list[str], **settings: Any) -> str:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [1.0 for _ in completions],
        max_new_tokens=2,
        **settings,
    )
    agent = PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPOConfig(episodes_per_update=2, minibatch_size=2))
    return overview(agent, 2)["prompts"]


def test_the_number_the_length_and_the_cuts_of_prompts() -> None:
    texts = ["a" * length for length in (1, 2, 3, 12)]
    assert prompts_of(texts) == "4 of 1 to 12 tokens (4.5 on average), none cut"
    with pytest.warns(CutPromptsWarning, match="2 of 4 prompts"):
        cut = prompts_of(texts, max_prompt_tokens=2)
    assert cut == "4 of 1 to 12 tokens (4.5 on average), 2 cut at their beginning"


def test_the_number_and_the_length_of_texts_to_learn() -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcdef"}]
    agent = SFT(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), SFTConfig(batch_size=2))
    lengths = sorted(len(text.prompt) + len(text.completion) for text in agent.texts)
    assert lengths == [4, 7], "with the end token"
    assert overview(agent)["data"] == "2 rows, texts of 4 to 7 tokens (5.5 on average)"
