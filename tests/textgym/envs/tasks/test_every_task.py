"""What holds for every registered task: checkers, pickles, specs, one row against many, and how fast it resets."""

from __future__ import annotations

import functools
import pickle
import random
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from textgym.data.corpora.articles import WIKI
from textgym.data.corpora.concepts import WORDNET
from textgym.data.corpora.questions import CHATTERBOT
from textgym.data.corpora.sources import CHITCHAT, cache_dir
from textgym.data.corpora.translations import CATALOGUES
from textgym.registration import TASKS
from textgym.testing import tolerance

ROUNDING = tolerance(terms=6656)  # the sums of the embedded model, for rewards of size 1

FETCHED = {
    "ConceptToText": [WORDNET],
    "Summarize": [WIKI],
    "DataToText": [WIKI],
    "Translate": CATALOGUES,
    "Answer": [CHATTERBOT],
    "Dialogue": [CHITCHAT],
}
"""Tasks whose text is fetched, and the files it is fetched in."""


def _param(name: str) -> Any:
    files = [cache_dir() / "downloads" / file.filename for file in FETCHED.get(name, [])]
    missing = [str(file) for file in files if not file.exists()]
    marks = [pytest.mark.data, pytest.mark.skipif(bool(missing), reason=f"not fetched: {missing}")] if files else []
    return pytest.param(f"textgym/{name}-v0", {"split": "test"} if files else {}, marks=marks, id=name)


every_task = pytest.mark.parametrize(("env_id", "kwargs"), [_param(name) for name in TASKS])


@every_task
def test_gymnasiums_and_sb3s_checkers_have_nothing_to_say(env_id: str, kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(env_id, **kwargs, disable_env_checker=True).unwrapped
        check_env(env, skip_render_check=True)
        sb3_check_env(env)


@pytest.mark.parametrize("name", TASKS)
def test_the_width_and_the_kl_coefficient_are_those_that_its_docstring_names(name: str) -> None:
    single: Any = load_env_creator(str(gym.spec(f"textgym/{name}-v0").entry_point))
    settings = single.settings(prompts=[{"prompt": "a"}])
    words = " ".join(single.__doc__.split())
    prompt, response = re.findall(r"`W = (.+?) \+ (.+?)`", words)[0]
    numbers = {"length + 1": "4"}  # of copying, three words
    assert settings["max_prompt_tokens"] == int(prompt)
    assert settings["max_new_tokens"] == int(numbers.get(response, response))
    coefs = [float(coef) for coef in re.findall(r"([\d.]+) times the log-prob", words)]
    assert [settings.get("kl_coef", 0.0)] == (coefs or [0.0])


@every_task
def test_spec_is_json_and_makes_the_same_environment(env_id: str, kwargs: dict[str, Any]) -> None:
    env = gym.make(env_id, **kwargs, max_new_tokens=3)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    first, other = (e.reset(seed=3)[0]["input_ids"] for e in (env, again))
    np.testing.assert_array_equal(first, other)
    assert again.unwrapped.task.episodes.max_new_tokens == 3


@every_task
def test_a_pickled_environment_goes_on_alike(env_id: str, kwargs: dict[str, Any]) -> None:
    env = gym.make(env_id, **kwargs, max_new_tokens=4).unwrapped
    env.reset(seed=1)
    env.step(5)
    copy = pickle.loads(pickle.dumps(env))
    for action in (6, 7, 8):
        mine, theirs = env.step(action), copy.step(action)
        assert mine[1:4] == (pytest.approx(theirs[1], abs=ROUNDING), *theirs[2:4])
        assert mine[4] == pytest.approx(theirs[4], nan_ok=True, abs=ROUNDING)
        np.testing.assert_array_equal(mine[0]["input_ids"], theirs[0]["input_ids"])


@every_task
def test_a_row_of_many_is_the_environment_of_one(env_id: str, kwargs: dict[str, Any]) -> None:
    kwargs = {**kwargs, "max_new_tokens": 6} if kwargs else {}  # a few tokens of a fetched text are enough
    env = gym.make(env_id, **kwargs).unwrapped
    envs = gym.make_vec(env_id, num_envs=3, **kwargs, autoreset_mode="Disabled").unwrapped
    chosen = [0, 2, 4] if len(env.task.rows) > 4 else [0, 0, 0]
    actions = np.random.default_rng(0).integers(2, 12, (env.task.episodes.max_new_tokens, 3))
    actions[-2, 0] = env.task.episodes.stop.ids[0]
    envs.reset(seed=0, options={"prompt_index": chosen})
    steps = [envs.step(action) for action in actions]
    for row, prompt in enumerate(chosen):
        env.reset(seed=0, options={"prompt_index": prompt})
        terminated, step = False, 0
        while not terminated:
            observation, reward, terminated, _, info = env.step(actions[step, row])
            many, rewards, ended, _, infos = steps[step]
            np.testing.assert_array_equal(observation["input_ids"], many["input_ids"][row])
            assert (reward, terminated) == (pytest.approx(rewards[row], abs=ROUNDING), ended[row])
            step += 1
        assert info["score"] == pytest.approx(infos["score"][row], abs=ROUNDING)
        assert env.transcript == envs.transcript[row]


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions run, of Python's and of C's."""
    events: list[str] = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: events.append(event))
    function()
    sys.setprofile(before)
    return sum(event.endswith("call") for event in events)


@every_task
def test_reset_is_fast_and_leaves_global_generators_alone(env_id: str, kwargs: dict[str, Any]) -> None:
    """Counted in calls, since a busy machine is slow at anything: about 70, and thousands if it read all prompts."""
    env = gym.make(env_id, **kwargs).unwrapped
    env.reset(seed=0)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for seed in range(5):
        assert calls_of(functools.partial(env.reset, seed=seed)) < 200
        env.step(3)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@every_task
def test_metrics_can_be_asked_of_its_episodes(env_id: str, kwargs: dict[str, Any]) -> None:
    """They find the columns they read, and are numbers."""
    envs = gym.make_vec(env_id, num_envs=2, **kwargs).unwrapped
    metrics = list(envs.metrics)
    if not metrics:
        assert env_id == "textgym/Sentiment-v0", "`textgym evaluate` has a judge for it"
        return
    asked = gym.make_vec(env_id, num_envs=2, **kwargs, reward=metrics, autoreset_mode="SameStep")
    asked.reset(seed=0)
    infos: dict[str, Any] = {}
    while "final_info" not in infos:
        *_, infos = asked.step([9, 10])
    values = [infos["final_info"][key] for key in infos["final_info"] if key.startswith("reward/")]
    assert len(values) == len(metrics)
    assert np.isfinite(values).all()
