"""KLCallback: the KL paid where the buffer is SB3's own, and what is logged."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.logger import configure

from textgym.rewards.kl import AdaptiveKL
from textgym.sb3 import EpisodeReplayBuffer, KLCallback, SyncReferenceCallback, TextQPolicy
from textgym.testing import assert_trained_alike, mock_lm, terms_of, tolerance

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs

MakeEnv = Any
STOCK: dict[str, Any] = {"rollout_buffer_class": DictRolloutBuffer, "rollout_buffer_kwargs": {}}


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_pays_what_the_buffer_pays(
    make_env: MakeEnv, lm_folder: str, make_model: Any, shift_weights: Any, algorithm: Any
) -> None:
    vectors, callbacks = [], (None, KLCallback(mock_lm(), 0.1))
    for ours, callback in zip((True, False), callbacks, strict=True):
        model = make_model(make_env(), algorithm, **({} if ours else STOCK))
        shift_weights(model)
        model.learn(2 * 48, callback=callback)
        vectors.append(model.policy.parameters_to_vector())
    assert_trained_alike(*vectors, model.learning_rate)


def logged(model: Any, folder: Path, callback: Any, steps: int = 4 * 48) -> list[dict[str, str]]:
    model.set_logger(configure(str(folder), ["csv"]))
    model.learn(steps, callback=callback, log_interval=1)
    with (folder / "progress.csv").open() as file:
        return list(csv.DictReader(file))


def test_logs_beside_the_episode_buffer(make_env: MakeEnv, make_model: Any, shift_weights: Any, tmp_path: Path) -> None:
    model = make_model(make_env())
    shift_weights(model)
    rows = logged(model, tmp_path, KLCallback())
    assert all(float(row["textgym/kl"]) for row in rows)
    assert all(0 < float(row["textgym/response_tokens"]) <= 5 for row in rows)
    assert all(float(row["textgym/score"]) >= 0 for row in rows)
    assert all(float(row["textgym/kl_coef"]) == pytest.approx(0.1) for row in rows)
    assert all(" >" in row["textgym/completions"] for row in rows)


@pytest.mark.parametrize("pays", [True, False])
def test_measures_the_same_whether_it_pays_or_not(
    make_env: MakeEnv, lm_folder: str, make_model: Any, shift_weights: Any, tmp_path: Path, pays: bool
) -> None:
    figures = []
    for name, callback in (("paid", KLCallback(lm_folder, 0.1 if pays else 0.0)), ("logged", KLCallback())):
        changes = STOCK if name == "paid" else {}
        model = make_model(make_env(kl_coef=0.1 if pays or name == "logged" else 0.0), **changes)
        shift_weights(model)
        rows = logged(model, tmp_path / name, callback, steps=48)
        figures.append(float(rows[0]["textgym/kl"]))
    assert figures[0] == pytest.approx(figures[1], abs=ROUNDING)


def test_coefficient_follows_its_controller(
    make_env: MakeEnv, lm_folder: str, make_model: Any, shift_weights: Any
) -> None:
    controller = AdaptiveKL(target=1e-6, horizon=100, coef=0.1)
    callback = KLCallback(lm_folder, controller)
    model = make_model(make_env(), **STOCK)
    shift_weights(model)
    coefficients = []
    for first in (True, False):  # `learn` again goes on from there
        model.learn(48, callback=callback, reset_num_timesteps=first)
        assert callback.penalty is not None
        coefficients.append(callback.penalty.coef)
    assert 0.1 < coefficients[0] < coefficients[1]
    make_model(make_env(), **STOCK).learn(0, callback=callback)
    assert callback.penalty.coef == controller.coef == 0.1, "another model starts where the setting says"


def named(name: str) -> Any:
    def reward(completions: list[str]) -> list[float]:
        return [float(len(name))] * len(completions)

    reward.__name__ = name
    return reward


def test_functions_whose_names_share_a_long_beginning_are_logged(
    make_env: MakeEnv, make_model: Any, tmp_path: Path
) -> None:
    """SB3's table cuts names to 36 characters, and raises an error if two are then equal."""
    same = "politeness_of_the_answer_to_the_"
    names = [f"{same}{end}" for end in ("user_in_english", "user_in_french", "user_in_german", "2_user_in_german")]
    model = make_model(make_env(reward=[named(name) for name in [*names, "short"]]))
    model.set_logger(configure(str(tmp_path), ["stdout", "csv", "log"]))
    model.learn(2 * 48, callback=KLCallback(), log_interval=1)
    with (tmp_path / "progress.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    means = {key: float(value) for key, value in row.items() if key.startswith("textgym/reward/")}
    assert sorted(means.values()) == sorted(float(len(name)) for name in [*names, "short"])
    assert means["textgym/reward/short"] == 5.0
    assert means[f"textgym/reward/{names[0]}"] == len(names[0])


def test_paying_twice_is_refused(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    with pytest.raises(ValueError, match="by EpisodeRolloutBuffer and by KLCallback"):
        make_model(make_env()).learn(48, callback=KLCallback(lm_folder, 0.1))
    with pytest.raises(ValueError, match="by the environment and by KLCallback"):
        make_model(make_env(kl_mode="reference"), **STOCK).learn(48, callback=KLCallback(lm_folder, 0.1))


def test_algorithms_without_log_probs(make_env: MakeEnv, lm_folder: str, tmp_path: Path) -> None:
    env = make_env(kl_mode="reference")
    model = DQN(
        TextQPolicy,
        env,
        learning_starts=20,
        batch_size=8,
        gamma=1.0,
        policy_kwargs={"model": lm_folder},
        replay_buffer_class=EpisodeReplayBuffer,
    )
    with pytest.raises(ValueError, match="DQN has no log-probs"):
        model.learn(40, callback=KLCallback(lm_folder, 0.1))
    rows = logged(model, tmp_path, KLCallback(), steps=200)
    assert any(row["textgym/score"] for row in rows)


def test_discount_warns(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    with pytest.warns(UserWarning, match=r"gamma=0.99 discounts"):
        make_model(make_env(), gamma=0.99, **STOCK).learn(48, callback=KLCallback(lm_folder, 0.1))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="there is no reference"):
        KLCallback(kl_coef=0.1)
    with pytest.raises(ValueError, match="whole distributions"):
        KLCallback("tiny", kl_estimator="full")


def test_what_reward_functions_give_and_log_is_logged(make_env: MakeEnv, make_model: Any, tmp_path: Path) -> None:
    def logs(completions: list[str], log_metric: Any) -> list[float | None]:
        log_metric("accuracy", 0.5)
        return [None, *[2.0] * len(completions)][: len(completions)]

    env = make_env(reward=[logs, broken], on_reward_error="skip", max_reward_failures=1.0)
    with pytest.warns(UserWarning, match="'broken' raised"):
        rows = logged(make_model(env), tmp_path, KLCallback())
    assert {row["textgym/unscored"] for row in rows} == {"1.0"}
    assert "textgym/score" not in rows[0]
    assert {row["textgym/reward/logs"] for row in rows} == {"2.0"}
    assert {row["textgym/metric/accuracy"] for row in rows} == {"0.5"}
    assert {row["textgym/reward_errors"] for row in rows} == {"1.0"}
    assert "textgym/reward/broken" not in rows[0]


def broken(completions: list[str]) -> list[float]:
    raise OSError("gone")


def test_the_reference_follows_the_policy(make_env: MakeEnv, make_model: Any, shift_weights: Any) -> None:
    model = make_model(make_env(), learning_rate=0.0)
    shift_weights(model)
    model.learn(2 * 48)
    assert float(np.mean(np.abs(model.rollout_buffer.episode_kl))) > 1e-3
    model.learn(4 * 48, callback=SyncReferenceCallback(every=2))
    assert float(np.mean(np.abs(model.rollout_buffer.episode_kl))) < ROUNDING


def test_there_must_be_a_reference_to_move(make_env: MakeEnv, make_model: Any) -> None:
    model = make_model(make_env(kl_coef=0.0), **STOCK)
    with pytest.raises(ValueError, match="no reference to move"):
        model.learn(48, callback=SyncReferenceCallback(every=1))


def test_the_mean_score_is_over_the_episodes_that_have_one(make_env: MakeEnv, make_model: Any, tmp_path: Path) -> None:
    def none_or_one(completion_ids: list[list[int]]) -> list[float | None]:
        return [None if ids[0] % 2 else -1.0 for ids in completion_ids]

    rows = logged(make_model(make_env(reward=none_or_one)), tmp_path, KLCallback())
    assert {row["textgym/score"] for row in rows if row["textgym/score"]} == {"-1.0"}
    assert any(0.0 < float(row["textgym/unscored"]) < 1.0 for row in rows)


@pytest.mark.parametrize("stock", [False, True])
def test_each_rollout_counts_its_own_episodes(
    make_env: MakeEnv, make_model: Any, shift_weights: Any, stock: bool
) -> None:
    """Figures of a rollout are over the episodes that ended in it, and not over those of earlier rollouts too."""
    counted: list[int] = []
    ended: list[int] = []

    class Counted(KLCallback):
        def _on_training_start(self) -> None:
            super()._on_training_start()
            ended.append(0)

        def _on_step(self) -> bool:
            ended[-1] += int(self.locals["dones"].sum())
            return super()._on_step()

        def _on_rollout_end(self) -> None:
            kl = self.episode_kl if stock else self.buffer.episode_kl
            assert len(kl) == len(self.scores) == len(self.lengths) == len(self.unscored)
            counted.append(len(self.scores))
            super()._on_rollout_end()
            ended.append(0)

    model = make_model(make_env(), **(STOCK if stock else {}))
    shift_weights(model)
    model.learn(3 * 48, callback=Counted(mock_lm(), 0.1) if stock else Counted())
    assert counted == ended[:-1]
    assert min(counted) > 0
