"""Agents that are saved on one device and go on on another, in all directions, with the weights that were saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from textgym.agents import DQN, PPO, DQNConfig, PPOConfig
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

pytestmark = pytest.mark.gpu

KINDS: dict[str, Any] = {
    "PPO": (PPO, PPOConfig(episodes_per_update=8, minibatch_size=4)),
    "DQN": (DQN, DQNConfig(episodes_per_update=8, batch_size=8, gradient_steps=1, learning_starts=1)),
}


def make_envs(device: torch.device) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=8,
        prompts=["one", "three", "a longer prompt"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(set(text))) for text in completions],
        kl_coef=0.02,
        kl_mode="deferred",
        max_prompt_tokens=8,
        max_new_tokens=6,
        device=str(device),
    )


def weights_of(agent: Any) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in agent.policy.state_dict().items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_run_goes_from_device_to_cpu_and_back(name: str, device: torch.device, tmp_path: Path) -> None:
    kind, config = KINDS[name]
    agent = kind(ActorCritic.from_pretrained(mock_lm(), device=device), make_envs(device), config).learn(16)
    for step, place in enumerate((device, torch.device("cpu"), device)):
        folder = tmp_path / str(step)
        agent.save(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # another kind of device has other random numbers
            resumed = kind.load(folder, envs=make_envs(place), device=place)
        assert resumed.policy.device.type == place.type
        for weight, other in zip(weights_of(resumed).values(), weights_of(agent).values(), strict=True):
            assert weight.equal(other), "copies of weights are equal, whatever they are copied to"

        resumed.learn(resumed.episodes + 8)
        assert resumed.updates == agent.updates + 1
        agent = resumed
