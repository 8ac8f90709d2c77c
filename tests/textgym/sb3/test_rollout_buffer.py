"""EpisodeRolloutBuffer: equality with SB3's buffer, the KL, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer

from textgym.models.token_model import TokenModel
from textgym.rewards.kl import AdaptiveKL
from textgym.sb3 import EpisodeRolloutBuffer
from textgym.testing import assert_close, assert_trained_alike, byte_tokenizer, mock_lm, terms_of, tolerance

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())
LOG_PROB = 8.0  # the size of the mock model's log-probs
ROUNDING = tolerance(FORWARD, scale=LOG_PROB)

MakeEnv = Any


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_one_update_changes_the_parameters_as_the_stock_buffer_does(
    make_env: MakeEnv, lm_folder: str, algorithm: Any, critic: str, make_model: Any
) -> None:
    vectors = []
    for buffer, kwargs in ((EpisodeRolloutBuffer, {}), (DictRolloutBuffer, {})):
        changes: dict[str, Any] = {"normalize_advantage": True, "ent_coef": 0.01, "vf_coef": 0.5}
        model = make_model(
            make_env(kl_coef=0.0),
            algorithm,
            policy_kwargs={"model": lm_folder, "critic": critic},
            rollout_buffer_class=buffer,
            rollout_buffer_kwargs=kwargs,
            **changes,
        )
        start = model.policy.parameters_to_vector()
        model.learn(2 * 48)  # the second rollout begins in the middle of episodes
        vectors.append(model.policy.parameters_to_vector())
    assert np.abs(vectors[0] - start).max() > 1e-5
    assert_trained_alike(*vectors, model.learning_rate)


def test_first_epoch_has_ratio_one(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    model = make_model(make_env())
    model.learn(2 * 48)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < tolerance()
    assert model.logger.name_to_value["train/clip_fraction"] == 0


def test_log_probs_recomputed_from_observations_equal_those_of_the_rollout(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any
) -> None:
    model = make_model(make_env())
    buffer = collect(model, 2)
    for batch in buffer.get(16):
        values, log_probs, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        assert_close(log_probs, batch.old_log_prob, terms=FORWARD)
        assert_close(values.flatten(), batch.old_values, terms=FORWARD)


def test_temperature_reaches_policy_and_reference(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any
) -> None:
    model = make_model(make_env(), policy_kwargs={"model": lm_folder, "temperature": 0.7})
    buffer = collect(model)
    assert abs(np.array(buffer.episode_kl)).max() < ROUNDING
    model.learn(48)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < tolerance()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_equals_that_recomputed_by_hand(
    make_env: MakeEnv, lm_folder: str, estimator: str, make_model: Any, collect: Any, shift_weights: Any
) -> None:
    kwargs = {"reference": lm_folder, "kl_coef": 0.3, "kl_estimator": estimator}
    model = make_model(make_env(kl_coef=0.3), rollout_buffer_kwargs=kwargs)
    shift_weights(model)
    seen = Recorder(model)
    buffer = collect(model)
    reference = TokenModel(mock_lm())
    for step, (observation, actions, log_probs, rewards) in enumerate(seen.steps):
        for row in range(4):
            context = observation["input_ids"][row][: observation["attention_mask"][row].sum()][None]
            other = reference.lm(input_ids=torch.as_tensor(context)).logits[0, -1].log_softmax(-1)[actions[row]]
            d = float(log_probs[row] - other.detach())
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]
            slope = {"k1": 1.0, "k2": abs(d), "k3": abs(1 - np.exp(-d))}[estimator]  # what it makes of an error of d
            rounding = ROUNDING * max(1.0, slope)
            assert buffer.rewards[step, row] == pytest.approx(rewards[row] - 0.3 * kl, abs=0.3 * rounding)


def test_kl_equals_that_of_exact_stepping(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any, shift_weights: Any
) -> None:
    rewards = []
    for kl_mode in ("deferred", "exact"):
        deferred = kl_mode == "deferred"
        env = make_env(kl_mode=kl_mode)
        kwargs = {"reference": lm_folder, "kl_coef": 0.1} if deferred else {}
        model = make_model(env, rollout_buffer_kwargs=kwargs)
        shift_weights(model)
        if not deferred:
            env.attach_policy(model.policy)
        rewards.append(collect(model, 2).rewards)
    assert np.abs(rewards[0]).max() > 0
    assert_close(rewards[0], rewards[1], terms=FORWARD, scale=LOG_PROB)


def test_kl_of_an_episode_is_its_sum_over_rollouts(
    make_env: MakeEnv, lm_folder: str, make_model: Any, shift_weights: Any
) -> None:
    """Rollouts of 3 steps cut the episodes of up to 5; the sums must not notice."""
    totals = {}
    for n_steps in (3, 60):
        model = make_model(make_env(), n_steps=n_steps)
        shift_weights(model)
        ended: list[float] = []
        _, callback = model._setup_learn(10**6, None)
        for _ in range(60 // n_steps):
            model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
            ended += model.rollout_buffer.episode_kl
        totals[n_steps] = sorted(ended)
    assert len(totals[3]) > 20
    assert_close(totals[3], totals[60], terms=FORWARD, scale=LOG_PROB)


def test_kl_of_an_abandoned_episode_does_not_count(
    make_env: MakeEnv, make_model: Any, collect: Any, shift_weights: Any
) -> None:
    """A second `learn` resets the environment in the middle of episodes."""
    model = make_model(make_env(stop=()), n_steps=3)
    shift_weights(model)
    collect(model)
    buffer = collect(model)
    assert buffer.episode_kl == []
    assert_close(buffer.kl_so_far, collect_kl(buffer).sum(0), terms=3, scale=LOG_PROB)


def collect_kl(buffer: Any) -> Any:
    """The KL that was taken off the rewards, which pay nothing else before the fifth token."""
    return -buffer.rewards / 0.1


def test_coefficient_follows_its_controller(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any, shift_weights: Any
) -> None:
    controller = AdaptiveKL(target=1e-6, horizon=100, coef=0.1)
    model = make_model(make_env(), rollout_buffer_kwargs={"reference": lm_folder, "kl_coef": controller})
    shift_weights(model)
    ended = len(collect(model).episode_kl)
    assert ended > 3
    assert model.rollout_buffer.penalty.coef == pytest.approx(0.1 * (1 + 0.2 * ended / 100))
    assert controller.coef == 0.1, "the buffer moves a copy"


def test_minibatches_hold_every_step_once_and_whole_segments(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any
) -> None:
    model = make_model(make_env())
    buffer = collect(model, 2)
    batches = list(buffer.get(16))
    assert len(batches) == 3
    assert all(8 <= len(batch.actions) <= 24 for batch in batches)
    got = sorted(float(value) for batch in batches for value in batch.old_log_prob)
    np.testing.assert_array_equal(got, np.sort(buffer.log_probs.flatten()))
    (everything,) = buffer.get(None)
    assert len(everything.actions) == 48
    assert len(everything.observations) == 48
    sizes = [len(batch.actions) for batch in buffer.get(1)]  # smaller than any segment
    assert sum(sizes) == 48


def test_observations_can_be_sub_sampled_token_by_token(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any
) -> None:
    """As TRPO's sub_sampling_factor does."""
    model = make_model(make_env())
    (batch,) = collect(model).get(None)
    with torch.no_grad():
        _, every, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        _, third, _ = model.policy.evaluate_actions(batch.observations[::3], batch.actions[::3])
    assert_close(every[::3], third, terms=FORWARD)


@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_only_truncated_rows_are_bootstrapped(
    make_env: MakeEnv, lm_folder: str, length_limit: str, make_model: Any, collect: Any
) -> None:
    model = make_model(make_env(length_limit=length_limit, kl_coef=0.0, stop=()), rollout_buffer_kwargs={})
    with torch.no_grad():
        model.policy.actor_critic.value_head.bias.fill_(10.0)
    seen = Recorder(model)
    buffer = collect(model)
    ends = 0
    for step, (_, _, _, rewards) in enumerate(seen.steps):
        for row, info in enumerate(seen.infos[step]):
            bootstrapped = 10.0 if info.get("TimeLimit.truncated") else 0.0
            ends += bool(bootstrapped)
            assert buffer.rewards[step, row] == pytest.approx(rewards[row] + bootstrapped, abs=ROUNDING)
    assert (ends > 0) == (length_limit == "truncate")


@pytest.mark.parametrize("prompt_tokens", [8, 64, 512])
def test_memory_a_step_whatever_the_context(tmp_path: Path, prompt_tokens: int, make_model: Any, collect: Any) -> None:
    from textgym.sb3 import make_vec_env

    mock_lm(max_position_embeddings=1024).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    env = make_vec_env(
        "textgym/Text-v0",
        n_envs=2,
        prompts=["x" * prompt_tokens],
        tokenizer=str(tmp_path),
        reward=lambda completions: [0.0] * len(completions),
        max_prompt_tokens=prompt_tokens,
        max_new_tokens=48,
    )
    model = make_model(env, folder=str(tmp_path), n_steps=96, batch_size=192, rollout_buffer_kwargs={})
    buffer = collect(model)
    assert buffer.nbytes() / (96 * 2) < 64
    stock = DictRolloutBuffer(96, env.observation_space, env.action_space, n_envs=2)
    assert sum(array.nbytes for array in stock.observations.values()) / (96 * 2) == 16 * (prompt_tokens + 48)


def test_paying_twice_is_refused(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    for kl_mode in ("reference", "exact"):
        with pytest.raises(ValueError, match="applied twice, by the environment and by EpisodeRolloutBuffer"):
            make_model(make_env(kl_mode=kl_mode))


def test_paying_nothing_is_refused(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    for changes in ({"rollout_buffer_kwargs": {}}, {"rollout_buffer_class": None, "rollout_buffer_kwargs": {}}):
        model = make_model(make_env(), **changes)
        with pytest.raises(ValueError, match="nothing applies the KL penalty"):
            model.learn(48)
    make_model(make_env(kl_coef=0.0), rollout_buffer_kwargs={}).learn(48)  # where none is due


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kl_coef": 0.1}, ValueError, "there is no reference"),
        ({"reference": "here", "kl_coef": 0.1, "kl_estimator": "full"}, ValueError, "whole distributions"),
        ({"reference": mock_lm(), "kl_coef": 0.1}, TypeError, "reference must be a name or a path"),
        ({"reference": "tiny", "kl_coef": 0.1}, ValueError, "was saved with another tokenizer"),
    ],
)
def test_bad_arguments(
    make_env: MakeEnv, lm_folder: str, kwargs: dict[str, Any], error: type[Exception], message: str, make_model: Any
) -> None:
    if kwargs.get("reference") == "here":
        kwargs = {**kwargs, "reference": lm_folder}
    with pytest.raises(error, match=message):
        make_model(make_env(), rollout_buffer_kwargs=kwargs)


def test_discount_warns(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    with pytest.warns(UserWarning, match=r"gamma=0.99 discounts") as caught:
        make_model(make_env(), gamma=0.99).learn(96)
    assert len([w for w in caught if "discounts" in str(w.message)]) == 1


def test_observations_that_do_not_grow_by_the_action_are_refused(
    make_env: MakeEnv, lm_folder: str, make_model: Any
) -> None:
    buffer = make_model(make_env()).rollout_buffer
    observation = {"input_ids": np.ones((4, 13), dtype=np.int64), "attention_mask": np.ones((4, 13), dtype=np.int64)}
    step = (np.zeros((4, 1)), np.zeros(4), np.zeros(4), torch.zeros(4), torch.zeros(4))
    buffer.add(observation, *step)
    with pytest.raises(ValueError, match="grows by one token per step"):
        buffer.add(observation, *step)


class Recorder:
    """What the environment and the policy said at each step of a rollout, before the buffer had it."""

    def __init__(self, model: Any) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.infos: list[list[dict[str, Any]]] = []
        forward, step_wait = model.policy.forward, model.env.step_wait

        def recorded_forward(observation: Any, *args: Any, **kwargs: Any) -> Any:
            self.said = (observation, *forward(observation, *args, **kwargs))
            return self.said[1:]

        def recorded_step() -> Any:
            result = step_wait()
            observation, actions, _, log_probs = self.said
            self.steps.append((observation, actions.numpy(), log_probs.numpy(), result[1].copy()))
            self.infos.append(result[3])
            return result

        model.policy.forward, model.env.step_wait = recorded_forward, recorded_step
