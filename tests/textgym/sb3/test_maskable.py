"""MaskablePPO: masks in acting, scoring and the reference alike; with a refreshing mask it is NLPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from sb3_contrib.common.maskable.utils import get_action_masks

from textgym.models.distributions.masks import TopKMask, TopPMask
from textgym.models.token_model import TokenModel
from textgym.sb3 import (
    KLCallback,
    MaskableEpisodeRolloutBuffer,
    MaskableTextActorCriticPolicy,
    MaskRefreshCallback,
)
from textgym.testing import assert_close, assert_trained_alike, mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
LOG_PROB = 8.0  # the size of the mock model's log-probs
ROUNDING = tolerance(FORWARD, scale=LOG_PROB)

pytestmark = pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")  # tested in test_kl.py

MakeEnv = Any
SOME = torch.arange(258) % 5 != 3


def by_last_token(observation: Any) -> torch.Tensor:
    """A mask that depends on the context: nothing that follows an even byte may be even."""
    ids, lengths = (torch.as_tensor(observation[key]) for key in ("input_ids", "attention_mask"))
    last = ids.gather(1, lengths.sum(1, keepdim=True) - 1)
    return (last + torch.arange(258)) % 2 == 1


@pytest.fixture
def maskable(lm_folder: str) -> Any:
    def make(env: Any, **changes: Any) -> Any:
        defaults: dict[str, Any] = {
            "n_steps": 12,
            "batch_size": 48,
            "n_epochs": 1,
            "gamma": 1.0,
            "seed": 0,
            "policy_kwargs": {"model": lm_folder},
            "rollout_buffer_class": MaskableEpisodeRolloutBuffer,
            "rollout_buffer_kwargs": {"reference": lm_folder, "kl_coef": 0.1},
        }
        return MaskablePPO(MaskableTextActorCriticPolicy, env, **{**defaults, **changes})

    return make


def restrictions(lm_folder: str) -> dict[str, dict[str, Any]]:
    return {
        "none": {},
        "minimum": {"min_new_tokens": 3},
        "function": {"action_mask": by_last_token},
        "top_p": {"action_mask": TopPMask(lm_folder, p=0.8)},
        "top_k": {"action_mask": TopKMask(lm_folder, k=9), "min_new_tokens": 2},
    }


KINDS = ["none", "minimum", "function", "top_p", "top_k"]


@pytest.mark.parametrize("kind", KINDS)
def test_behaviour_log_probs_are_those_of_the_masked_distribution(
    make_env: MakeEnv, lm_folder: str, maskable: Any, kind: str
) -> None:
    env = make_env(**restrictions(lm_folder)[kind])
    model = maskable(env)
    model.learn(2 * 48)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < tolerance()
    assert model.logger.name_to_value["train/clip_fraction"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "top_p" else pytest.mark.slow) for kind in KINDS[1:]]
)
def test_mean_kl_of_masked_sampling_is_not_negative(
    make_env: MakeEnv, lm_folder: str, maskable: Any, shift_weights: Any, kind: str
) -> None:
    """Log-ratios of 250 to 400 episodes: their mean is 13 to 19 standard errors above 0, and 25 to 100 are negative.

    Measured over 8 seeds of each kind. So another sample fails with a chance far below 1 in 10,000.
    """
    env = make_env(n_envs=32, **restrictions(lm_folder)[kind])
    model = maskable(env, n_steps=40)
    _, callback = model._setup_learn(10**6, None)
    model.collect_rollouts(env, callback, model.rollout_buffer, 40)
    assert np.abs(model.rollout_buffer.episode_kl).max() < ROUNDING  # the reference itself, masked alike
    shift_weights(model)
    model.collect_rollouts(env, callback, model.rollout_buffer, 40)
    kl = np.array(model.rollout_buffer.episode_kl)
    assert kl.mean() > 0
    assert kl.min() < 0  # single episodes may be


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("minimum", "top_p") else pytest.mark.slow) for kind in KINDS]
)
def test_one_update_changes_the_parameters_as_the_stock_buffer_does(
    make_env: MakeEnv, lm_folder: str, maskable: Any, kind: str
) -> None:
    vectors = []
    for buffer in (MaskableEpisodeRolloutBuffer, MaskableDictRolloutBuffer):
        env = make_env(kl_coef=0.0, **restrictions(lm_folder)[kind])
        model = maskable(env, rollout_buffer_class=buffer, rollout_buffer_kwargs={}, ent_coef=0.01)
        model.learn(2 * 48)
        vectors.append(model.policy.parameters_to_vector())
    assert_trained_alike(*vectors, model.learning_rate)


def test_masked_tokens_are_never_written(make_env: MakeEnv, maskable: Any) -> None:
    env = make_env(action_mask=lambda observation: SOME.expand(len(observation["input_ids"]), -1))
    model = maskable(env)
    model.learn(5 * 48)
    assert SOME[model.rollout_buffer.actions.astype(int)].all()
    observation = env.reset()
    for _ in range(5):
        actions, _ = model.predict(observation, action_masks=get_action_masks(env))
        assert SOME[actions].all()
        observation, *_ = env.step(actions)


def test_kl_equals_that_of_exact_stepping(make_env: MakeEnv, lm_folder: str, maskable: Any, shift_weights: Any) -> None:
    rewards = []
    for kl_mode in ("deferred", "exact"):
        env = make_env(kl_mode=kl_mode, min_new_tokens=3, action_mask=TopKMask(lm_folder, k=20))
        kwargs = {"reference": lm_folder, "kl_coef": 0.1} if kl_mode == "deferred" else {}
        model = maskable(env, rollout_buffer_kwargs=kwargs)
        shift_weights(model)
        if kl_mode == "exact":
            env.attach_policy(model.policy)
        _, callback = model._setup_learn(10**6, None)
        model.collect_rollouts(env, callback, model.rollout_buffer, 12)
        rewards.append(model.rollout_buffer.rewards)
    assert_close(rewards[0], rewards[1], terms=FORWARD, scale=LOG_PROB)


def test_mask_model_equals_the_policy_of_the_moment_of_each_refresh(
    make_env: MakeEnv, lm_folder: str, maskable: Any
) -> None:
    mask = TopPMask(lm_folder, p=0.8)
    env = make_env(action_mask=mask)
    model = maskable(env, learning_rate=1e-2)
    seen = []

    class Watch(MaskRefreshCallback):
        """Looks after each refresh whose opinion the mask is made of."""

        def _on_rollout_start(self) -> None:
            before = mask.model
            super()._on_rollout_start()
            observation = env.unwrapped.action_space.observation
            now = mask.choose(TokenModel(model.policy.actor_critic.lm).next_logits(observation))
            same = torch.equal(torch.as_tensor(np.stack(env.env_method("action_masks"))), now)
            seen.append((mask.model is not before, same))

    model.learn(5 * 48, callback=Watch(target_update_interval=2))
    refreshed, same = zip(*seen, strict=True)
    assert refreshed == (False, False, True, False, True)
    assert same == (True, False, True, False, True)  # at first both are the reference
    assert abs(model.logger.name_to_value["train/clip_fraction"]) == 0  # updates 1 epoch: masks did not move in between


def test_training_without_masks(make_env: MakeEnv, maskable: Any) -> None:
    model = maskable(make_env(min_new_tokens=3))
    model.learn(48, use_masking=False)
    assert model.num_timesteps == 48


def test_masks_that_were_not_acted_under_are_refused(make_env: MakeEnv, lm_folder: str, maskable: Any) -> None:
    env = make_env(action_mask=TopKMask(lm_folder, k=9))
    model = maskable(env)
    model.tokens = env.action_space
    env.action_space.action_mask.k = 90
    _, callback = model._setup_learn(10**6, None)
    step = env.env_method

    def other(*args: Any, **kwargs: Any) -> Any:
        return [mask & SOME.numpy() for mask in step(*args, **kwargs)]

    env.env_method = other
    with pytest.raises(ValueError, match="are not those that were acted under"):
        model.collect_rollouts(env, callback, model.rollout_buffer, 12)


def test_loading_with_a_mask(make_env: MakeEnv, lm_folder: str, maskable: Any, tmp_path: Path) -> None:
    env = make_env(action_mask=TopKMask(lm_folder, k=9))
    maskable(env).learn(48).save(tmp_path / "model")
    model = MaskablePPO.load(tmp_path / "model", env=env, action_space=env.action_space)
    model.learn(48)
    with pytest.raises(ValueError, match=r"action_space=env\.action_space"):
        MaskablePPO.load(tmp_path / "model", env=env).learn(48)


def test_distribution_is_masked(make_env: MakeEnv, maskable: Any) -> None:
    env = make_env()
    model = maskable(env)
    observation = {key: torch.as_tensor(value) for key, value in env.reset().items()}
    distribution = model.policy.get_distribution(observation, SOME.expand(4, -1).numpy())
    assert distribution.distribution.probs[:, ~SOME].max() < 1e-6


def test_refresh_wants_a_mask_by_a_model(make_env: MakeEnv, maskable: Any) -> None:
    with pytest.raises(ValueError, match="no mask that depends on a model"):
        maskable(make_env(action_mask=by_last_token)).learn(48, callback=MaskRefreshCallback())
    with pytest.raises(ValueError, match="at least 1"):
        MaskRefreshCallback(0)


def test_kl_callback_masks_the_reference_too(
    make_env: MakeEnv, lm_folder: str, maskable: Any, shift_weights: Any
) -> None:
    """Stock maskable buffer and KLCallback beside our buffer."""
    rewards = []
    for ours in (True, False):
        env = make_env(action_mask=TopKMask(lm_folder, k=9))
        stock = {"rollout_buffer_class": MaskableDictRolloutBuffer, "rollout_buffer_kwargs": {}}
        model = maskable(env, **({} if ours else stock))
        shift_weights(model)
        _, callback = model._setup_learn(10**6, None if ours else KLCallback(lm_folder, 0.1))
        callback.on_training_start({}, {})
        model.collect_rollouts(env, callback, model.rollout_buffer, 12)
        rewards.append(model.rollout_buffer.rewards)
    assert_close(rewards[0], rewards[1], terms=FORWARD, scale=LOG_PROB)


def test_policies_sample_by_default(make_env: Any, lm_folder: str) -> None:
    env = make_env(16)
    model = MaskablePPO(MaskableTextActorCriticPolicy, env, policy_kwargs={"model": lm_folder}, gamma=1.0, seed=0)
    observation = {name: torch.as_tensor(column) for name, column in env.reset().items()}
    with torch.no_grad():
        likeliest, _, _ = model.policy.forward(observation, deterministic=True)
        assert torch.equal(model.policy._predict(observation, deterministic=True), likeliest)
        for chosen in (model.policy.forward(observation)[0], model.policy._predict(observation)):
            assert (chosen != likeliest).sum() > 8, "258 tokens of about the same probability"
