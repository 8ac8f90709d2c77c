"""What agents of other libraries demand of an environment: spaces, names, and infos without NaN."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import textgym  # noqa: F401  (registers the ids)
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.sb3 import TextVecEnv
from textgym.testing import mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

EOS = 256
IDS = ("textgym/Sentiment-v0", "textgym/SentimentMLP-v0")


def opinion(completions: list[str]) -> list[float | None]:
    """Has none of texts that are empty."""
    return [float(len(text)) if text else None for text in completions]


def of_one(settings: dict[str, Any], prompt: int, actions: list[int]) -> dict[str, Any]:
    env = TextEnv(**settings)
    env.reset(options={"prompt_index": prompt})
    *_, (_, _, terminated, _, info) = (env.step(action) for action in actions)
    assert terminated
    return info


def test_what_is_unknown_has_no_key(settings: dict[str, Any]) -> None:
    settings["reward"] = [settings["reward"], opinion]
    settings["reward_weights"] = [1.0, 0.5]
    empty, short = of_one(settings, 0, [EOS]), of_one(settings, 1, [97, EOS])
    assert "reward/opinion" not in empty
    assert short["reward/opinion"] == 1.0
    for info in (empty, short):
        assert "kl" not in info, "the environment does not know the policy"
        assert not any(math.isnan(value) for value in info.values())


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_infos_of_rows_are_those_of_one(settings: dict[str, Any], mode: AutoresetMode) -> None:
    settings["reward"] = [settings["reward"], opinion]
    envs = TextVectorEnv(3, **settings, autoreset_mode=mode)
    envs.reset(options={"prompt_index": [0, 1, 2]})
    envs.step([97, 97, 97])
    infos = envs.step([EOS, 97, 97])[4]
    alone = of_one(settings, 0, [97, EOS])
    infos = infos.get("final_info", infos)
    keys = {key for key in infos if not key.startswith("_")}
    assert {key: infos[key][0] for key in keys} == pytest.approx(alone, abs=ROUNDING)
    assert all(infos[f"_{key}"].tolist() == [True, False, False] for key in keys)


def test_rows_of_which_some_have_no_opinion(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **{**settings, "reward": [settings["reward"], opinion], "max_new_tokens": 2})
    envs.reset(seed=0)
    envs.step([97, 97])
    assert envs.step([EOS, 97])[4]["_reward/opinion"].tolist() == [True, True]
    envs.reset(seed=0)
    infos = envs.step([EOS, 97])[4]
    assert infos["_score"].tolist() == [True, False]
    assert "reward/opinion" not in infos
    env = TextVecEnv(TextVectorEnv(2, **{**settings, "reward": [settings["reward"], opinion], "max_new_tokens": 1}))
    env.reset()
    first, second = env.step(np.array([EOS, 97]))[3]
    assert "reward/opinion" not in first
    assert second["reward/opinion"] == 1.0


@pytest.mark.parametrize("env_id", IDS)
def test_infos_are_numbers_that_the_agent_may_write_into(env_id: str) -> None:
    env = gym.make(env_id, max_new_tokens=2)
    for _ in range(2):
        _, info = env.reset(seed=0)
        while True:
            assert "mine" not in info
            assert all(type(value) in (int, float, bool) for value in info.values())
            info["mine"] = 1
            if "score" in info:
                break
            info = env.step(3)[4]


@pytest.mark.parametrize("env_id", IDS)
def test_names_and_spaces(env_id: str) -> None:
    """Tianshou takes the keys `state` and `mask` for its own; flat dicts of vectors are what all can encode."""
    env = gym.make(env_id, max_new_tokens=1)
    env.reset(seed=0)
    info = env.step(3)[4]
    space = env.observation_space
    spaces = dict(space) if isinstance(space, gym.spaces.Dict) else {"observation": space}
    assert not {"state", "mask"} & {*spaces, *info}
    for box in spaces.values():
        assert isinstance(box, gym.spaces.Box)
        assert len(box.shape) == 1
        assert box.dtype == (np.int64 if env_id == "textgym/Sentiment-v0" else np.float32)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_autoreset_mode_is_an_attribute_and_in_the_metadata(env_id: str, mode: AutoresetMode) -> None:
    """TorchRL reads the one, Gymnasium's own wrappers read the other."""
    envs: Any = gym.make_vec(env_id, 2, autoreset_mode=mode)
    assert envs.autoreset_mode == envs.metadata["autoreset_mode"] == mode
