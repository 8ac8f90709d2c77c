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


def make_agent(prompts: list[str], rows: int = 2, episodes_per_update: int = 2, **settings: Any) -> PPO:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=rows,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [1.0 for _ in completions],
        max_new_tokens=2,
        **settings,
    )
    config = PPOConfig(episodes_per_update=episodes_per_update, minibatch_size=2)
    return PPO(ActorCritic.from_pretrained(mock_lm()), envs, config)


def prompts_of(prompts: list[str], **settings: Any) -> str:
    return overview(make_agent(prompts, **settings), 2)["prompts"]


def test_the_number_the_length_and_the_cuts_of_prompts() -> None:
    texts = ["a" * length for length in (1, 2, 3, 12)]
    assert prompts_of(texts) == "4 of 1 to 12 tokens (4.5 on average), none cut"
    with pytest.warns(CutPromptsWarning, match="2 of 4 prompts"):
        cut = prompts_of(texts, max_prompt_tokens=2)
    assert cut == "4 of 1 to 12 tokens (4.5 on average), 2 cut at their beginning"


def test_a_run_that_is_made_longer_counts_the_updates_that_it_makes() -> None:
    """The last update of the shorter run was smaller, so later ones do not begin at multiples of their size."""
    agent = make_agent(["a"], episodes_per_update=8)
    assert overview(agent, 12)["training"] == "12 episodes: 2 update(s) of 8 episodes, the last one of 4, 2 at a time"
    assert overview(agent, 4)["training"] == "4 episodes: 1 update(s) of 4 episodes, 2 at a time"
    agent.learn(12)
    assert overview(agent, 12)["training"] == "12 episodes: 2 update(s) of 8 episodes, 2 at a time"
    assert overview(agent, 25)["training"] == "25 episodes: 4 update(s) of 8 episodes, the last one of 5, 2 at a time"
    agent.learn(25)
    assert (agent.episodes, agent.updates) == (25, 4)


def test_the_number_and_the_length_of_texts_to_learn() -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcdef"}]
    agent = SFT(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), SFTConfig(batch_size=2))
    lengths = sorted(len(text.prompt) + len(text.completion) for text in agent.texts)
    assert lengths == [4, 7], "with the end token"
    assert overview(agent)["data"] == "2 rows, texts of 4 to 7 tokens (5.5 on average)"


@pytest.mark.parametrize(
    ("total", "training"),
    [
        (5, "5 episodes: 1 update(s) of 5 episodes, 4"),
        (16, "16 episodes: 2 update(s) of 8 episodes, 4"),
        (21, "21 episodes: 3 update(s) of 8 episodes, the last one of 5, 4"),
    ],
)
def test_the_overview_says_what_is_played(total: int, training: str) -> None:
    agent = make_agent(["a", "b"], rows=4, episodes_per_update=8)
    assert overview(agent, total)["training"] == f"{training} at a time"
