"""HiddenStateObservation: the vector is that of a full pass; small agents of SB3 train on it."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.sb3 import make_vec_env
from textgym.testing import assert_close, mock_lm, terms_of
from textgym.wrappers import HiddenStateObservation, VectorHiddenStateObservation

FORWARD = terms_of(mock_lm())

ENV_ID = "textgym/SentimentMLP-v0"


def full_pass(lm: Any, observation: dict[str, np.ndarray]) -> np.ndarray:
    ids = observation["input_ids"][: observation["attention_mask"].sum()]
    with torch.no_grad():
        return lm.base_model(torch.tensor(ids)[None]).last_hidden_state[0, -1].numpy()


def test_it_is_the_last_hidden_state(settings: dict[str, Any]) -> None:
    plain, env = TextEnv(**settings), HiddenStateObservation(TextEnv(**settings))
    tokens, _ = plain.reset(options={"prompt_index": 1})
    seen, _ = env.reset(options={"prompt_index": 1})
    for action in (97, 98, 99):
        assert_close(seen, full_pass(settings["reference"], tokens), terms=FORWARD)
        assert env.observation_space.contains(seen)
        tokens, seen = plain.step(action)[0], env.step(action)[0]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rows_and_their_final_observations(settings: dict[str, Any], mode: AutoresetMode) -> None:
    """Trap 39: the vector that a row ended with is delivered once, and the fresh one after it."""
    plain = TextVectorEnv(3, **settings, autoreset_mode=mode)
    envs = VectorHiddenStateObservation(TextVectorEnv(3, **settings, autoreset_mode=mode))
    assert envs.autoreset_mode == mode
    tokens, _ = plain.reset(seed=1)
    seen, _ = envs.reset(seed=1)
    finals = 0
    for actions in np.random.default_rng(0).choice([97, 256], (9, 3)):
        for row in range(3):
            one = {key: value[row] for key, value in tokens.items()}
            assert_close(seen[row], full_pass(settings["reference"], one), terms=FORWARD)
        tokens, *_, token_infos = plain.step(actions)
        seen, *_, infos = envs.step(actions)
        for row in np.flatnonzero(infos.get("_final_obs", [])):
            finals += 1
            expected = full_pass(settings["reference"], token_infos["final_obs"][row])
            assert_close(infos["final_obs"][row], expected, terms=FORWARD)
    assert (finals > 3) == (mode == AutoresetMode.SAME_STEP)


def test_only_one_view_of_the_tokens(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="use only one wrapper"):
        HiddenStateObservation(HiddenStateObservation(TextEnv(**settings)))


def test_registered_task_and_its_checkers() -> None:
    env = gym.make(ENV_ID)
    assert gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json())).action_space == env.action_space
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*infinity")  # a hidden state has no bounds
        warnings.filterwarnings("ignore", ".*different from the unwrapped version")  # that is what a view is
        check_env(env, skip_render_check=True)
        sb3_check_env(env)


def test_vector_form_of_the_registered_task() -> None:
    env, envs = gym.make(ENV_ID, max_new_tokens=4), gym.make_vec(ENV_ID, num_envs=3, max_new_tokens=4)
    actions = np.random.default_rng(0).integers(0, 32, (4, 3))
    for row in range(3):
        first, _ = envs.reset(options={"prompt_index": [5, 6, 7]})
        observation, _ = env.reset(options={"prompt_index": 5 + row})
        np.testing.assert_allclose(first[row], observation, atol=1e-4)
        for step in actions:
            seen, rewards, terminated, _, _ = envs.step(step)
            observation, reward, ended, _, _ = env.step(step[row])
            np.testing.assert_allclose(seen[row], observation, atol=1e-4)
            assert (rewards[row], terminated[row]) == (pytest.approx(reward, abs=1e-4), ended)
            if ended:
                break


def test_stock_ppo_with_its_own_policy_and_buffer() -> None:
    env = make_vec_env(ENV_ID, n_envs=2, max_new_tokens=4, min_new_tokens=1)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, gamma=1.0, seed=0).learn(32)
    assert model.num_timesteps == 32
    assert env.get_attr("task")[0].kl_mode == "reference", "not left to an agent that sees no tokens"
    assert len(model.ep_info_buffer) > 4
    assert np.stack(env.env_method("action_masks")).shape == (2, 32), "of the view, not of the tokens"
