"""The average of the policy's weights over updates, which `ema_decay` asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from peft import LoraConfig

from textgym.agents import PPO, PPOConfig
from textgym.models.actor_critic import ActorCritic
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of


def make_agent(lora: Any = None, ema_decay: float | None = None) -> PPO:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=16,
        prompts=["one", "x"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(sum(letter in "aeiou" for letter in text)) for text in completions],
        stop=list(range(0, 256, 8)),  # so that lengths differ
        kl_coef=0.0,
        max_new_tokens=6,
    )
    config = PPOConfig(episodes_per_update=16, minibatch_size=16, learning_rate=1e-2, ema_decay=ema_decay)
    return PPO(ActorCritic.from_pretrained(mock_lm(), lora=lora), envs, config)


def test_the_average_gives_each_update_its_weight() -> None:
    agent = make_agent(ema_decay=0.75)
    weights = [next(agent.policy.lm.parameters()).detach().clone()]
    agent.learn(48, [lambda agent, _: weights.append(next(agent.policy.lm.parameters()).detach().clone())])
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.75 * expected + 0.25 * weight
    mean = next(agent.averaged.lm.parameters())
    assert_close(mean, expected, terms=4)
    assert not mean.requires_grad
    assert make_agent().averaged is None


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_average_can_be_saved_as_a_model_of_its_own(lora: bool, tmp_path: Path) -> None:
    """A transformers folder, which is loaded and evaluated as any policy."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None
    agent = make_agent(adapter, ema_decay=0.5).learn(32)
    assert agent.averaged is not None
    agent.averaged.save_pretrained(tmp_path / "averaged", byte_tokenizer())
    loaded = ActorCritic.from_pretrained(tmp_path / "averaged")
    states = agent.play().sequences.states()
    with torch.no_grad():
        saved, expected, last = (model.logits(states) for model in (loaded, agent.averaged, agent.policy))
    assert_close(saved, expected, terms=terms_of(mock_lm()), scale=8.0)
    assert (saved - last).abs().max() > 1e-3
    with pytest.raises(FileExistsError):
        agent.averaged.save_pretrained(tmp_path / "averaged")
