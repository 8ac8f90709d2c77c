"""Adam's moments in 8 bits: smaller, they learn as well, and resume bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.agents.machine.memory_by_role import bytes_by_role
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

pytest.importorskip("bitsandbytes")


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def make_envs() -> Any:
    settings: dict[str, Any] = {"reward": vowels, "kl_mode": "deferred", "max_new_tokens": 6, "reference": mock_lm()}
    return gym.make_vec("textgym/Text-v0", 16, prompts=["one", "two"], tokenizer=byte_tokenizer(), **settings)


def make_agent(eight_bit: bool, lm: Any = None) -> PPO:
    config = PPOConfig(episodes_per_update=32, minibatch_size=8, learning_rate=1e-2, adam_8bit=eight_bit)
    return PPO(ActorCritic.from_pretrained(lm or mock_lm()), make_envs(), config)


def test_moments_take_a_quarter() -> None:
    sizes = []
    for eight_bit in (False, True):
        agent = make_agent(eight_bit, mock_lm(hidden_size=128))
        agent.learn(32)
        sizes.append(bytes_by_role(agent)["optimiser"])
    assert sizes[1] < 0.3 * sizes[0]


ROWS = [{"prompt": "a", "completion": "bcd"}, {"prompt": "e", "completion": "fg"}] * 8


def losses_of(eight_bit: bool) -> list[float]:
    """Of supervised learning, all rows in one batch."""
    losses: list[float] = []
    config = SFTConfig(batch_size=16, max_steps=20, learning_rate=1e-2, adam_8bit=eight_bit)
    agent = SFT(ActorCritic.from_pretrained(mock_lm()), ROWS, byte_tokenizer(), config)
    agent.learn([lambda _, metrics: losses.append(metrics["loss"])])
    return losses


def test_learns_with_moments_in_8_bits_as_in_32() -> None:
    """All rows are one batch, so that no sampling takes part."""
    small, whole = losses_of(True), losses_of(False)
    assert whole[-1] < 0.1 * whole[0]
    assert small[0] - small[-1] > 0.9 * (whole[0] - whole[-1])


@pytest.mark.bit_for_bit
def test_resume_bit_for_bit_with_moments_in_8_bits(tmp_path: Path) -> None:
    whole, part = make_agent(True).learn(160), make_agent(True)
    part.learn(160, [lambda agent, _: agent.updates < 3])
    part.save(tmp_path / "agent")
    resumed = PPO.load(tmp_path / "agent", envs=make_envs()).learn(160)
    for (key, expected), actual in zip(
        whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), key


def test_embeddings_of_offline_agents_too() -> None:
    """transformers' own way to 8 bits leaves embeddings out, in all optimisers of the process from then on."""
    rows = [{"prompt": "a", "completion": "bcd"}] * 8
    for _ in range(2):
        agent = SFT(
            ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), SFTConfig(max_steps=1, adam_8bit=True)
        ).learn()
        optimizer = agent.trainer.optimizer
        embedding = agent.policy.lm.get_input_embeddings().weight
        assert optimizer.state[embedding]["state1"].dtype == torch.uint8


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'textgym\[adam8bit\]'"):
        make_agent(True)
