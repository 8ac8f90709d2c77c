"""TextActorCriticPolicy under PPO, A2C and TRPO: what SB3 documents of a policy, and the walls."""

from __future__ import annotations

import csv
import io
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from transformers import AutoModelForCausalLM

from textgym.models.actor_critic import ActorCritic
from textgym.sb3 import TextActorCriticPolicy
from textgym.testing import byte_tokenizer, mock_lm, tolerance

MakeEnv = Any


def test_rollout_actions_are_those_of_an_uncached_policy(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any
) -> None:
    tokens = []
    for cached in (True, False):
        model = make_model(make_env())
        if not cached:
            forward = model.policy.forward

            def uncached(*args: Any, model: Any = model, forward: Any = forward, **kwargs: Any) -> Any:
                model.policy.reset_cache()
                return forward(*args, **kwargs)

            model.policy.forward = uncached
        tokens.append(collect(model, 2).actions)
    np.testing.assert_array_equal(tokens[0], tokens[1])


@pytest.mark.bit_for_bit
def test_same_seed_same_run(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    vectors = [make_model(make_env()).learn(96).policy.parameters_to_vector() for _ in range(2)]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    other = make_model(make_env(), seed=1).learn(96).policy.parameters_to_vector()
    assert (vectors[0] != other).any()


def test_construction_leaves_pretrained_weights_alone(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    for ortho_init in (False, True):
        model = make_model(make_env(), policy_kwargs={"model": lm_folder, "ortho_init": ortho_init})
        for name, weight in mock_lm().state_dict().items():
            torch.testing.assert_close(model.policy.actor_critic.lm.state_dict()[name], weight, atol=0, rtol=0)
        assert not model.policy.actor_critic.value_head.weight.any()


def test_dropout_of_the_config_is_off(make_env: MakeEnv, tmp_path: Path, make_model: Any) -> None:
    mock_lm(attention_dropout=0.5).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = make_model(make_env(), folder=str(tmp_path))
    model.learn(48)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < tolerance()


def test_predict(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    env = make_env()
    model = make_model(env)
    observation = env.reset()
    actions, state = model.predict(observation, deterministic=True)
    assert actions.shape == (4,)
    assert state is None
    np.testing.assert_array_equal(actions, model.predict(observation, deterministic=True)[0])
    one = {key: value[1] for key, value in observation.items()}
    action, _ = model.predict(one, deterministic=True)
    assert action.shape == ()
    assert action == actions[1]
    drawn = {tuple(model.predict(observation)[0]) for _ in range(5)}
    assert len(drawn) > 1
    mean, _ = evaluate_policy(model, env, n_eval_episodes=4, deterministic=True)
    assert np.isfinite(mean)


def test_predict_decodes_one_token_at_a_time(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    """`predict` sets the evaluation mode on every call; that must not drop the cache."""
    env = make_env(stop=())
    model = make_model(env)
    observation = env.reset()
    positions = []
    trunk = model.policy.actor_critic.lm.base_model
    trunk.register_forward_hook(lambda *call: positions.append(call[2].last_hidden_state.shape[1]))
    for _ in range(4):
        observation, _, _, _ = env.step(model.predict(observation)[0])
    assert positions[1:] == [1, 1, 1]


def test_save_and_load(make_env: MakeEnv, lm_folder: str, tmp_path: Path, make_model: Any) -> None:
    env = make_env()
    model = make_model(env)
    model.learn(96)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=make_env())
    np.testing.assert_array_equal(loaded.policy.parameters_to_vector(), model.policy.parameters_to_vector())
    observation = env.reset()
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    loaded.learn(96, reset_num_timesteps=False)
    assert loaded.num_timesteps == 192
    assert PPO.load(tmp_path / "model").predict(observation, deterministic=True)[0].shape == (4,)


def test_saved_file_holds_names_and_weights_but_no_pickled_model(
    make_env: MakeEnv, lm_folder: str, tmp_path: Path, make_model: Any
) -> None:
    model = make_model(make_env())
    model.learn(48)
    model.save(tmp_path / "model")
    archive = zipfile.ZipFile(tmp_path / "model.zip")
    data = archive.read("data").decode()
    assert lm_folder in data
    assert len(data) < 60_000
    for word in ("LlamaForCausalLM", "ActorCritic'", "TokenModel"):
        assert word not in data
    weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    assert "actor_critic.value_head.weight" in weights
    state = zipfile.ZipFile(io.BytesIO(archive.read("policy.pth")))
    (pickled,) = (name for name in state.namelist() if name.endswith("data.pkl"))
    modules = {str(argument) for _, argument, _ in pickletools.genops(state.read(pickled)) if argument is not None}
    assert not any(module.startswith(("transformers", "textgym")) for module in modules)


def test_set_parameters(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    one, other = make_model(make_env()), make_model(make_env())
    one.learn(48)
    other.set_parameters(one.get_parameters())
    np.testing.assert_array_equal(one.policy.parameters_to_vector(), other.policy.parameters_to_vector())
    vector = one.policy.parameters_to_vector()
    other.policy.load_from_vector(vector + 1)
    np.testing.assert_allclose(other.policy.parameters_to_vector(), vector + 1)


def test_policy_alone_saves_and_loads(
    make_env: MakeEnv, lm_folder: str, tmp_path: Path, make_model: Any, shift_weights: Any
) -> None:
    env = make_env()
    model = make_model(env)
    shift_weights(model)
    model.policy.save(tmp_path / "policy.pth")
    loaded = TextActorCriticPolicy.load(tmp_path / "policy.pth")
    observation = env.reset()
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.policy.predict(observation, deterministic=True)[0]
    )


def test_exports_a_transformers_folder(make_env: MakeEnv, lm_folder: str, tmp_path: Path, make_model: Any) -> None:
    model = make_model(make_env())
    model.learn(48)
    model.policy.save_pretrained(tmp_path / "lm", byte_tokenizer())
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    for name, weight in model.policy.actor_critic.lm.state_dict().items():
        torch.testing.assert_close(lm.state_dict()[name], weight)
    again = ActorCritic.from_pretrained(tmp_path / "lm")
    torch.testing.assert_close(again.value_head.weight, model.policy.actor_critic.value_head.weight)


def test_schedules_limits_and_loggers(make_env: MakeEnv, lm_folder: str, tmp_path: Path, make_model: Any) -> None:
    model = make_model(
        make_env(),
        learning_rate=lambda progress: 1e-3 * progress,
        clip_range=lambda progress: 0.2 * progress,
        clip_range_vf=0.1,
        target_kl=1e-9,
        normalize_advantage=False,
        n_epochs=3,
        batch_size=16,
    )
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard", "json"]))
    model.learn(4 * 48, progress_bar=True)
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["train/learning_rate"]) for row in rows if row["train/learning_rate"]]
    assert rates == sorted(rates, reverse=True)
    assert float(rows[-1]["train/clip_range_vf"]) == pytest.approx(0.1)
    assert float(rows[-1]["train/n_updates"]) < 3 * 3  # target_kl ended epochs early
    assert list(tmp_path.glob("events.out.tfevents*"))


@pytest.mark.slow
def test_callbacks(make_env: MakeEnv, lm_folder: str, tmp_path: Path, make_model: Any) -> None:
    model = make_model(make_env())
    callbacks = [
        CheckpointCallback(12, str(tmp_path), name_prefix="text"),
        EvalCallback(make_env(2), eval_freq=10, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0),
        StopTrainingOnMaxEpisodes(max_episodes=30),
    ]
    model.learn(10**4, callback=callbacks)
    assert model.num_timesteps < 10**3
    assert (tmp_path / "text_48_steps.zip").exists()
    assert (tmp_path / "best_model.zip").exists()
    assert PPO.load(tmp_path / "best_model.zip").policy.model_kwargs["model"] == lm_folder


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": mock_lm()}, TypeError, "model must be a name or a path"),
        ({"model": "tiny"}, ValueError, "was saved with another tokenizer"),
        ({"model": "here", "temperature": 0.0}, ValueError, "temperature must be above 0"),
    ],
)
def test_bad_arguments(
    make_env: MakeEnv, lm_folder: str, kwargs: dict[str, Any], error: type[Exception], message: str, make_model: Any
) -> None:
    if kwargs["model"] == "here":
        kwargs = {**kwargs, "model": lm_folder}
    with pytest.raises(error, match=message):
        make_model(make_env(), policy_kwargs=kwargs)


def test_other_environments_and_continuous_exploration_are_refused(
    make_env: MakeEnv, lm_folder: str, make_model: Any
) -> None:
    with pytest.raises(ValueError, match="is not the action space of a textgym environment"):
        make_model("CartPole-v1")
    with pytest.raises(ValueError, match="can only be used with continuous actions"):
        make_model(make_env(), use_sde=True)


def test_kl_of_an_environment_that_masks_is_refused_to_a_policy_that_does_not(
    make_env: MakeEnv, lm_folder: str, make_model: Any
) -> None:
    env = make_env(kl_mode="exact", min_new_tokens=3)
    model = make_model(env, rollout_buffer_kwargs={})
    env.attach_policy(model.policy)
    with pytest.raises(ValueError, match="samples from all tokens"):
        model.learn(48)


def test_lora_trains_the_adapter_alone(make_env: MakeEnv, lm_folder: str, make_model: Any) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    for algorithm in (PPO, TRPO):
        model = make_model(make_env(), algorithm, policy_kwargs={"model": lm_folder, "lora": lora})
        before = {name: weight.clone() for name, weight in model.policy.actor_critic.lm.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.learn(48)
        after = model.policy.actor_critic.lm.state_dict()
        changed = {name for name, weight in after.items() if (weight != before[name]).any()}
        assert changed
        assert all("lora_" in name for name in changed)


def test_a_model_whose_vocabulary_is_padded_learns_where_the_environment_knows_its_size(
    tmp_path: Path, make_env: MakeEnv, make_model: Any
) -> None:
    folder = str(tmp_path)
    ActorCritic.from_pretrained(mock_lm(300, num_layers=1, eos_token_id=256)).save_pretrained(folder, byte_tokenizer())
    for settings in ({"tokenizer": folder, "reference": None, "kl_coef": 0.0}, {"reference": folder}):
        env = make_env(**settings)
        assert env.action_space.n == 300
        buffer = {"reference": settings["reference"], "kl_coef": 0.1} if settings["reference"] else None
        make_model(env, rollout_buffer_kwargs=buffer, policy_kwargs={"model": folder}).learn(48)
    env = make_env(tokenizer=byte_tokenizer(), reference=None, kl_coef=0.0)
    with pytest.raises(ValueError, match=r"the policy has 300 tokens \(models often pad.* action space 258"):
        make_model(env, policy_kwargs={"model": folder})


def test_stop_tokens_of_the_model_that_the_environment_does_not_know_are_refused(
    tmp_path: Path, make_env: MakeEnv, make_model: Any
) -> None:
    lm = mock_lm(num_layers=1)
    lm.generation_config.eos_token_id = [256, 200]
    lm.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = {"reference": None, "kl_coef": 0.0}
    with pytest.raises(ValueError, match=r"tokens \[200, 256\].*make the environment with stop=\[200\]"):
        make_model(make_env(tokenizer=byte_tokenizer(), **settings), policy_kwargs={"model": str(tmp_path)})
    env = make_env(tokenizer=str(tmp_path), **settings)
    assert {200, 256} <= set(env.action_space.stop.ids)
    make_model(env, policy_kwargs={"model": str(tmp_path)}, rollout_buffer_kwargs=None)


def test_policies_sample_by_default(make_env: MakeEnv, make_model: Any) -> None:
    """As SB3's rollouts and `predict` do; the most likely token is asked for by `deterministic=True`."""
    env = make_env(16)
    policy = make_model(env).policy
    observation = {name: torch.as_tensor(column) for name, column in env.reset().items()}
    with torch.no_grad():
        likeliest, _, _ = policy.forward(observation, deterministic=True)
        assert torch.equal(policy._predict(observation, deterministic=True), likeliest)
        for chosen in (policy.forward(observation)[0], policy._predict(observation)):
            assert (chosen != likeliest).sum() > 8, "258 tokens of about the same probability"
