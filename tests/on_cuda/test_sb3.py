"""The algorithms of Stable-Baselines3 and sb3-contrib on a GPU, beside environments on either device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sb3_contrib")

from sb3_contrib import QRDQN, TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO

from textgym.models.distributions.masks import TopPMask
from textgym.sb3 import (
    EpisodeReplayBuffer,
    EpisodeRolloutBuffer,
    KLCallback,
    MaskableEpisodeRolloutBuffer,
    MaskableTextActorCriticPolicy,
    MaskRefreshCallback,
    SyncReferenceCallback,
    TextActorCriticPolicy,
    TextQPolicy,
    TextQuantilePolicy,
    make_vec_env,
)
from textgym.testing import byte_tokenizer, mock_lm

BATCHES = {"n_steps": 4, "batch_size": 16, "n_epochs": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model in a folder."""
    folder = tmp_path_factory.mktemp("model")
    mock_lm(num_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def env(text_envs: Callable[..., Any]) -> Any:
    """An environment on the GPU."""
    return make_vec_env(text_envs("cuda", max_new_tokens=4))


def make(kind: Any, policy: Any, env: Any, model: str, **kwargs: Any) -> Any:
    return kind(policy, env, gamma=1.0, policy_kwargs={"model": model}, device="cuda", seed=0, **kwargs)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_ppo(
    device: str, model: str, text_envs: Callable[..., Any], tmp_path: Path, gpus: Callable[[int], None]
) -> None:
    env = make_vec_env(text_envs(device, max_new_tokens=4))
    buffer = {"rollout_buffer_kwargs": {"reference": model, "kl_coef": 0.05}}
    agent = make(PPO, TextActorCriticPolicy, env, model, rollout_buffer_class=EpisodeRolloutBuffer, **buffer, **BATCHES)
    agent.learn(32, callback=[KLCallback(), SyncReferenceCallback(1)])
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=env, device="cuda").learn(16)
    assert again.policy.device.type == "cuda"
    observation = env.reset()
    action, _ = agent.predict(observation, deterministic=True)
    gpus(0)
    on_cpu = PPO.load(tmp_path / "agent", device="cpu")
    assert on_cpu.predict(observation, deterministic=True)[0].shape == action.shape


def test_ppo_with_its_own_buffer(env: Any, model: str) -> None:
    make(PPO, TextActorCriticPolicy, env, model, **BATCHES).learn(32, callback=KLCallback(model, 0.1))


def test_a2c(env: Any, model: str) -> None:
    make(A2C, TextActorCriticPolicy, env, model, n_steps=4, rollout_buffer_class=EpisodeRolloutBuffer).learn(32)


def test_trpo(env: Any, model: str) -> None:
    settings = {"n_steps": 4, "batch_size": 16, "rollout_buffer_class": EpisodeRolloutBuffer}
    make(TRPO, TextActorCriticPolicy, env, model, **settings).learn(16)


def test_maskable_ppo(model: str, text_envs: Callable[..., Any]) -> None:
    mask = TopPMask(model, 0.9)
    env = make_vec_env(text_envs("cuda", max_new_tokens=4, min_new_tokens=2, action_mask=mask))
    settings = {"rollout_buffer_class": MaskableEpisodeRolloutBuffer, **BATCHES}
    agent = make(MaskablePPO, MaskableTextActorCriticPolicy, env, model, **settings)
    agent.learn(32, callback=MaskRefreshCallback(1))


@pytest.mark.parametrize(("kind", "policy"), [(DQN, TextQPolicy), (QRDQN, TextQuantilePolicy)])
def test_value_based(kind: Any, policy: Any, env: Any, model: str, tmp_path: Path) -> None:
    settings = {"learning_starts": 8, "train_freq": 4, "batch_size": 8, "buffer_size": 100}
    exploration = {"exploration_fraction": 1.0, "exploration_final_eps": 0.5}
    agent = make(kind, policy, env, model, replay_buffer_class=EpisodeReplayBuffer, **settings, **exploration)
    agent.learn(32)
    agent.save(tmp_path / "agent")
    again = kind.load(tmp_path / "agent", env=env, device="cuda", action_space=env.action_space).learn(16)
    assert torch.as_tensor(again.predict(env.reset(), deterministic=True)[0]).shape == (4,)


def test_auto_takes_the_gpu(model: str, text_envs: Callable[..., Any]) -> None:
    env = make_vec_env(text_envs(None, max_new_tokens=4))
    agent = PPO(TextActorCriticPolicy, env, policy_kwargs={"model": model}, **BATCHES)
    assert agent.policy.device.type == "cuda"
    agent.learn(16)
