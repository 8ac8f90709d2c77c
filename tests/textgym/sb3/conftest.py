"""A mock language model in a folder, since SB3's policies take names, and environments around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stable_baselines3 import PPO

from textgym.sb3 import EpisodeRolloutBuffer, TextActorCriticPolicy, make_vec_env
from textgym.testing import byte_tokenizer, mock_lm

MakeEnv = Callable[..., Any]


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(character in "aeiou" for character in text)) for text in completions]


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mock")
    mock_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(lm_folder: str) -> dict[str, Any]:
    return {
        "prompts": ["hello world", "good day", "a", "four", "fifth prompt"],
        "tokenizer": lm_folder,
        "reward": vowels,
        "reference": lm_folder,
        "kl_coef": 0.1,
        "max_prompt_tokens": 8,
        "max_new_tokens": 5,
        "stop": tuple(range(50)),  # many, so that random text ends at many lengths
    }


@pytest.fixture
def make_env(settings: dict[str, Any]) -> MakeEnv:
    def make(n_envs: int = 4, **changes: Any) -> Any:
        env = make_vec_env("textgym/Text-v0", n_envs=n_envs, **{**settings, **changes})
        env.seed(0)
        return env

    return make


@pytest.fixture
def make_model(lm_folder: str) -> Any:
    def make(env: Any, algorithm: Any = PPO, folder: str = lm_folder, **changes: Any) -> Any:
        defaults: dict[str, Any] = {
            "n_steps": 12,
            "gamma": 1.0,
            "seed": 0,
            "policy_kwargs": {"model": folder},
            "rollout_buffer_class": EpisodeRolloutBuffer,
            "rollout_buffer_kwargs": {"reference": lm_folder, "kl_coef": 0.1},
        }
        if algorithm is PPO:
            defaults |= {"batch_size": 48, "n_epochs": 1}
        return algorithm(TextActorCriticPolicy, env, **{**defaults, **changes})

    return make


@pytest.fixture
def collect() -> Any:
    def collect(model: Any, rollouts: int = 1) -> Any:
        """Fills the buffer without training."""
        _, callback = model._setup_learn(10**6, None)
        for _ in range(rollouts):
            model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        return model.rollout_buffer

    return collect


@pytest.fixture
def shift_weights() -> Any:
    def shift_weights(model: Any) -> None:
        """A policy that is no longer its reference."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.policy.actor_critic.lm.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    return shift_weights
