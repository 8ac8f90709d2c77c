"""TextVecEnv: SB3's interface, and equality with SB3's own DummyVecEnv over single environments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common import env_util
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecFrameStack, VecMonitor, VecNormalize

import textgym  # noqa: F401  (registers the ids)
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.sb3 import KLCallback, TextActorCriticPolicy, TextVecEnv, make_vec_env
from textgym.testing import assert_close, mock_lm, terms_of, tolerance

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs
FORWARD = terms_of(mock_lm())

MakeEnv = Any


def dummy_beside(env: Any, settings: dict[str, Any], **changes: Any) -> VecEnv:
    """SB3's DummyVecEnv over `TextEnv`s that start from the prompts that the rows of `env` drew."""
    task = env.unwrapped.envs.unwrapped.task

    class Pinned(gym.Wrapper):
        def __init__(self, row: int) -> None:
            super().__init__(TextEnv(**{**settings, **changes, "kl_mode": "deferred"}))
            self.row = row

        def reset(self, **kwargs: Any) -> Any:
            return self.env.reset(options={"prompt_index": int(task.current[self.row])})

    return DummyVecEnv([lambda row=row: Monitor(Pinned(row)) for row in range(env.num_envs)])


@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_ends_are_delivered_as_dummy_vec_env_does(
    make_env: MakeEnv, settings: dict[str, Any], length_limit: str
) -> None:
    env = make_env(3, length_limit=length_limit)
    dummy = dummy_beside(env, settings, length_limit=length_limit)
    assert_observations_equal(env.reset(), dummy.reset())
    rng, ends, truncations = np.random.default_rng(0), 0, 0
    for _ in range(40):
        actions = rng.integers(30, 120, 3)
        mine, theirs = env.step(actions), dummy.step(actions)
        assert_observations_equal(mine[0], theirs[0])
        assert_close(mine[1], theirs[1], terms=FORWARD, scale=8.0)
        np.testing.assert_array_equal(mine[2], theirs[2])
        for done, info, other in zip(mine[2], mine[3], theirs[3], strict=True):
            if not done:
                assert info == {}
                continue
            ends += 1
            truncations += info["TimeLimit.truncated"]
            assert_observations_equal(info.pop("terminal_observation"), other.pop("terminal_observation"))
            assert info["episode"]["r"] == pytest.approx(other.pop("episode")["r"], abs=ROUNDING)
            info.pop("episode")
            np.testing.assert_equal(info, other)
    assert ends > 15
    assert (truncations > 0) == (length_limit == "truncate")


def assert_observations_equal(mine: Any, theirs: Any) -> None:
    assert set(mine) == set(theirs)
    for key in mine:
        np.testing.assert_array_equal(mine[key], theirs[key])


def test_wrappers_of_sb3_work_on_top(make_env: MakeEnv) -> None:
    env = VecCheckNan(VecNormalize(VecMonitor(make_env()), norm_obs=False), raise_exception=True)
    observation = env.reset()
    for _ in range(12):
        observation, rewards, _, _ = env.step(np.full(4, 97))
    assert observation["input_ids"].shape == (4, 13)
    assert rewards.dtype == np.float32
    assert isinstance(env.unwrapped, TextVecEnv)


def test_returns_are_monitored(make_env: MakeEnv) -> None:
    env = make_env(2, kl_coef=0.0)
    env.reset()
    for _ in range(5):
        _, _, dones, infos = env.step([ord("a"), ord("b")])
    assert dones.all()
    assert [info["episode"]["r"] for info in infos] == [5.0, 0.0]
    assert [info["episode"]["l"] for info in infos] == [5, 5]


def test_seed_and_options_reach_the_next_reset(make_env: MakeEnv) -> None:
    env = make_env(4)
    first = env.reset()
    env.seed(0)
    assert_observations_equal(first, env.reset())
    env.set_options([{"prompt_index": 2}] * 4)
    env.reset()
    assert [transcript["prompt"] for transcript in env.get_attr("transcript")] == ["a"] * 4
    env.reset()
    assert {transcript["prompt"] for transcript in env.get_attr("transcript")} != {"a"}


def test_attributes_and_methods_of_the_rows(make_env: MakeEnv) -> None:
    env = make_env(4, min_new_tokens=2)
    env.reset()
    masks = np.stack(env.env_method("action_masks"))
    assert masks.shape == (4, 258)
    assert not masks[:, 256].any()
    assert env.get_attr("num_envs", indices=[0, 2]) == [4, 4]
    assert len(env.env_method("action_masks", indices=1)) == 1
    assert env.has_attr("action_masks")
    assert not env.has_attr("nothing_of_the_kind")
    assert env.env_is_wrapped(Monitor) == [False] * 4
    env.set_attr("info_text", True)
    for _ in range(5):
        _, _, _, infos = env.step(np.full(4, 97))
    assert infos[0]["completion"] == "aaaaa"
    env.close()


def test_environment_made_already(settings: dict[str, Any]) -> None:
    env = make_vec_env(TextVectorEnv(3, **settings))
    assert env.num_envs == 3
    assert env.action_space.kl_payer == "environment"
    with pytest.raises(ValueError, match="has its own"):
        make_vec_env(TextVectorEnv(3, **settings), n_envs=4)
    with pytest.raises(ValueError, match="has its own"):
        make_vec_env(TextVectorEnv(3, **settings), max_new_tokens=4)


def test_observations_are_not_overwritten_by_later_steps(make_env: MakeEnv) -> None:
    env = make_env(2)
    first = env.reset()
    kept = {key: value.copy() for key, value in first.items()}
    env.step([97, 97])
    assert_observations_equal(first, kept)


def test_sb3_check_env_passes(settings: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    check_env(TextEnv(**{**settings, "prompts": ["good day", "a"]}))  # none has to be cut
    assert not [str(warning.message) for warning in recwarn]


def test_stock_make_vec_env_and_stock_buffer_train(settings: dict[str, Any], lm_folder: str) -> None:
    env = env_util.make_vec_env("textgym/Text-v0", n_envs=3, seed=0, env_kwargs=settings)
    model = PPO(
        TextActorCriticPolicy, env, n_steps=8, batch_size=12, n_epochs=1, gamma=1.0, policy_kwargs={"model": lm_folder}
    )
    before = model.policy.parameters_to_vector()
    model.learn(48)
    assert np.isfinite(model.policy.parameters_to_vector()).all()
    assert (model.policy.parameters_to_vector() != before).any()


def test_vec_normalize_that_would_turn_tokens_into_floats_is_refused(make_env: MakeEnv, make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"must be whole numbers.* VecNormalize\(env, norm_obs=False\)"):
        make_model(VecNormalize(make_env())).learn(48)
    make_model(VecNormalize(make_env(), norm_obs=False)).learn(48)


def test_stacked_observations_are_refused(make_env: MakeEnv, make_model: Any) -> None:
    with pytest.raises(ValueError, match="must be padded on the right"):
        make_model(VecFrameStack(make_env(), 2)).learn(48)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])
def test_a_policy_of_sb3s_own_does_not_learn_while_nobody_pays_the_kl(make_env: MakeEnv, algorithm: Any) -> None:
    steps = {
        PPO: {"n_steps": 8, "batch_size": 32},
        A2C: {"n_steps": 8},
        DQN: {"learning_starts": 4, "buffer_size": 100},
    }[algorithm]
    with pytest.raises(ValueError, match="nothing applies the KL penalty"):
        algorithm("MultiInputPolicy", make_env(), **steps).learn(32)
    algorithm("MultiInputPolicy", make_env(kl_mode="reference"), **steps).learn(32)
    algorithm("MultiInputPolicy", make_env(kl_coef=0.0), **steps).learn(32)


def test_evaluation_needs_nobody_to_pay_the_kl(make_env: MakeEnv, lm_folder: str) -> None:
    env = make_env()
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=32, gamma=1.0)
    evaluate_policy(model, env, n_eval_episodes=4)
    watched = EvalCallback(make_env(), n_eval_episodes=4, eval_freq=4, verbose=0)
    model.learn(32, [KLCallback(lm_folder, 0.1), watched])
    assert np.isfinite(watched.last_mean_reward)


@pytest.mark.parametrize("wrapped", [False, True])
def test_evaluation_in_the_training_environment_is_refused(make_env: MakeEnv, wrapped: bool) -> None:
    """It would end the texts of the rollout that is under way, and SB3 says nothing."""
    env = make_env(kl_coef=0.0)
    model = PPO("MultiInputPolicy", VecCheckNan(env) if wrapped else env, n_steps=8, batch_size=32, gamma=1.0)
    with pytest.raises(ValueError, match="an environment of its own, EvalCallback"):
        model.learn(32, EvalCallback(env, eval_freq=3, verbose=0))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that registers an id when it is imported."""
    places = "entry_point='textgym.envs.text:TextEnv', vector_entry_point='textgym.envs.vector:TextVectorEnv'"
    code = f"import gymnasium\ngymnasium.register('own/Text-v0', {places}, kwargs={{'kl_mode': 'reference'}})\n"
    (tmp_path / "registers_own_ids.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "registers_own_ids"
    gym.registry.pop("own/Text-v0", None)
    sys.modules.pop("registers_own_ids", None)


def test_an_id_with_a_module_is_asked_for_after_the_module_is_imported(
    own_module: str, settings: dict[str, Any]
) -> None:
    env = make_vec_env(f"{own_module}:own/Text-v0", n_envs=2, **settings)
    assert env.action_space.kl_payer == "environment", "the id is registered with kl_mode='reference'"
    assert make_vec_env(gym.spec("own/Text-v0"), n_envs=2, **settings).action_space.kl_payer == "environment"
    assert make_vec_env(gym.spec("textgym/Text-v0"), n_envs=2, **settings).action_space.kl_payer == "agent"
    with pytest.raises(gym.error.NameNotFound):
        make_vec_env("own/Other-v0")


@pytest.mark.parametrize("kind", ["single", "sync", "made", "class"])
def test_an_environment_that_is_no_text_vector_env_is_refused(
    settings: dict[str, Any], make_env: MakeEnv, kind: str
) -> None:
    env = {
        "single": lambda: gym.make("textgym/Text-v0", **settings),
        "sync": lambda: gym.vector.SyncVectorEnv([lambda: TextEnv(**settings)]),
        "made": make_env,
        "class": lambda: TextVectorEnv,
    }[kind]()
    with pytest.raises(TypeError, match="take a TextVectorEnv, got"):
        make_vec_env(env)


def test_rows_are_reset_with_the_same_options(make_env: MakeEnv) -> None:
    env = make_env(2)
    env.set_options([{}, {"prompt_index": 1}])
    with pytest.raises(ValueError, match="give each the same options"):
        env.reset()
    env.set_options([{"prompt_index": 3}, {"prompt_index": 1}])
    env.reset()
    assert [transcript["prompt"] for transcript in env.get_attr("transcript")] == ["four", "good day"]
