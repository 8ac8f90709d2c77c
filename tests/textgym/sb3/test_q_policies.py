"""TextQPolicy and TextQuantilePolicy under stock DQN and QRDQN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common import env_util
from stable_baselines3.common.buffers import DictReplayBuffer
from transformers import AutoModelForCausalLM

from textgym.sb3 import EpisodeReplayBuffer, TextQPolicy, TextQuantilePolicy, make_vec_env
from textgym.testing import Measured, assert_learns, assert_trained_alike, letter_tokenizer, mock_lm

MakeEnv = Any
BOTH = [(DQN, TextQPolicy), (QRDQN, TextQuantilePolicy)]


@pytest.fixture
def make_q(lm_folder: str) -> Any:
    def make(env: Any, algorithm: Any, policy: Any, **changes: Any) -> Any:
        defaults: dict[str, Any] = {
            "learning_starts": 12,
            "batch_size": 16,
            "train_freq": 5,
            "target_update_interval": 20,
            "gamma": 1.0,
            "seed": 0,
            "policy_kwargs": {"model": lm_folder},
            "replay_buffer_class": EpisodeReplayBuffer,
        }
        return algorithm(policy, env, **{**defaults, **changes})

    return make


def network(model: Any) -> Any:
    return model.policy.online


@pytest.mark.parametrize(("algorithm", "policy"), BOTH)
def test_packed_states_give_what_observations_give(
    make_env: MakeEnv, make_q: Any, algorithm: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient step from our buffer and from SB3's, on the same transitions."""
    vectors = []
    for ours in (True, False):
        env = make_env(1, kl_mode="reference", stop=())
        changes = {} if ours else {"replay_buffer_class": DictReplayBuffer}
        model = make_q(env, algorithm, policy, learning_starts=5, batch_size=5, **changes)
        if not ours:
            order = iter([np.arange(5), np.zeros(5, dtype=int)])
            monkeypatch.setattr(np.random, "randint", lambda *args, order=order, **kwargs: next(order))
        model.learn(5)
        model.learning_starts = 0
        model.train(gradient_steps=1, batch_size=5)
        vectors.append(torch.cat([weight.detach().flatten() for weight in network(model).parameters()]))
    assert_trained_alike(*vectors, model.learning_rate)


@pytest.mark.parametrize(("algorithm", "policy"), BOTH)
def test_starts_as_greedy_decoding_of_the_model(make_env: MakeEnv, make_q: Any, algorithm: Any, policy: Any) -> None:
    env = make_env(kl_mode="reference")
    model = make_q(env, algorithm, policy)
    observation = env.reset()
    actions, _ = model.predict(observation, deterministic=True)
    for row in range(4):
        context = observation["input_ids"][row][: observation["attention_mask"][row].sum()][None]
        logits = mock_lm()(input_ids=torch.as_tensor(context)).logits[0, -1]
        assert actions[row] == logits.argmax()
    assert model.predict({key: value[0] for key, value in observation.items()}, deterministic=True)[0].shape == ()


@pytest.mark.parametrize(("algorithm", "policy"), BOTH)
def test_greedy_action_is_the_best_by_the_network(make_env: MakeEnv, make_q: Any, algorithm: Any, policy: Any) -> None:
    env = make_env(kl_mode="reference")
    model = make_q(env, algorithm, policy, learning_rate=1e-2)
    model.learn(200)
    observation = env.reset()
    with torch.no_grad():
        values = network(model)({key: torch.as_tensor(value) for key, value in observation.items()})
    values = values if algorithm is DQN else values.mean(1)
    np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], values.argmax(1).numpy())


@pytest.mark.parametrize(("algorithm", "policy"), BOTH)
def test_save_and_load(make_env: MakeEnv, make_q: Any, algorithm: Any, policy: Any, tmp_path: Path) -> None:
    env = make_env(kl_mode="reference")
    model = make_q(env, algorithm, policy)
    model.learn(100)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=env, action_space=env.action_space)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == model.replay_buffer.size()
    np.testing.assert_array_equal(loaded.policy.parameters_to_vector(), model.policy.parameters_to_vector())
    observation = env.reset()
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    loaded.learn(40, reset_num_timesteps=False)
    alone = type(model.policy)
    model.policy.save(tmp_path / "policy.pth")
    again = alone.load(tmp_path / "policy.pth")
    np.testing.assert_array_equal(again.parameters_to_vector(), model.policy.parameters_to_vector())
    model.policy.save_pretrained(tmp_path / "lm")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    torch.testing.assert_close(lm.lm_head.weight, network(model).model.lm.lm_head.weight)


def test_random_actions_are_drawn_from_the_reference(make_env: MakeEnv, make_q: Any) -> None:
    """A chi-square test of the warm-up's and of epsilon-greedy's draws against the model's own probabilities."""
    env = make_env(64, kl_mode="reference", prompts=["a"])
    model = make_q(env, DQN, TextQPolicy, learning_starts=10**6)
    observation = env.reset()
    logits = mock_lm()(input_ids=torch.as_tensor(observation["input_ids"][:1, :1])).logits[0, -1]
    probabilities = logits.softmax(-1).detach().double().numpy()
    model._setup_learn(10, None)
    model.exploration_rate = 1.0
    warm_up = np.concatenate([model._sample_action(10**6, n_envs=64)[0] for _ in range(40)])
    epsilon = np.concatenate([model.predict(observation)[0] for _ in range(40)])
    for draws in (warm_up, epsilon):
        counts = np.bincount(draws, minlength=258)
        expected = probabilities * len(draws)
        chi_square = ((counts - expected) ** 2 / expected)[expected > 5].sum()
        # Wilson and Hilferty's bar at 4.6 deviations: none or one of 100,000 simulated samples is above it.
        freedom = (expected > 5).sum()
        assert chi_square < freedom * (1 - 2 / (9 * freedom) + 4.6 * np.sqrt(2 / (9 * freedom))) ** 3
    uniform = np.full(258, len(warm_up) / 258)
    assert ((np.bincount(warm_up, minlength=258) - uniform) ** 2 / uniform).sum() > 1000


def test_draws_are_for_the_states_of_the_moment(make_env: MakeEnv, make_q: Any) -> None:
    """Each row's draw follows from its own context, also after an evaluation elsewhere."""
    env = make_env(3, kl_mode="reference")
    model = make_q(env, DQN, TextQPolicy, learning_starts=10**6)
    seen = []
    model.policy.explorer.look = record(model.policy.explorer.look, seen)
    observation = env.reset()
    [env.action_space.sample() for _ in range(3)]
    observation, *_ = env.step([97, 98, 99])
    env.action_space.sample()  # one draw, the others are left over
    observation, *_ = env.step([97, 98, 99])
    [env.action_space.sample() for _ in range(3)]
    assert len(seen) == 3
    for key, value in observation.items():
        np.testing.assert_array_equal(seen[-1][key], value)


def record(function: Any, seen: list[Any]) -> Any:
    def recorded(observation: Any) -> Any:
        seen.append(observation)
        return function(observation)

    return recorded


def test_warm_up_without_a_known_state_is_uniform_and_says_so(settings: dict[str, Any], make_q: Any) -> None:
    env = env_util.make_vec_env("textgym/Text-v0", n_envs=2, seed=0, env_kwargs=settings)
    model = make_q(env, DQN, TextQPolicy, learning_starts=10)
    with pytest.warns(UserWarning, match="uniform over the vocabulary") as caught:
        model.learn(20)
    assert len([w for w in caught if "uniform over" in str(w.message)]) == 1


def test_deferred_kl_is_refused(make_env: MakeEnv, make_q: Any) -> None:
    with pytest.raises(ValueError, match="kl_mode='reference'"):
        make_q(make_env(), DQN, TextQPolicy).learn(100)


def test_names_only(make_env: MakeEnv, make_q: Any) -> None:
    with pytest.raises(TypeError, match="must be a name or a path"):
        make_q(make_env(), DQN, TextQPolicy, policy_kwargs={"model": mock_lm()})
    with pytest.raises(ValueError, match="was saved with another tokenizer"):
        make_q(make_env(), DQN, TextQPolicy, policy_kwargs={"model": "tiny"})


LETTERS = "abcde"
WORTH = {"ab": 1.0, "ba": 0.4, "bb": 0.4, "bc": 0.4}


def values_of(worth: dict[str, float]) -> dict[str, list[float]]:
    """What each next token is worth in the states where it matters, by hand: after nothing, `a` and `b`."""
    after = {first: [worth.get(first + letter, 0.0) for letter in LETTERS] for first in LETTERS}
    return {"": [max(after[letter]) for letter in LETTERS], "a": after["a"], "b": after["b"]}


@pytest.fixture
def likeness(make_q: Any, tmp_path: Path) -> Any:
    """Five tokens, two of them a text: `ab` is worth most, though `b` is the better start for random text.

    How well a network's values correlate with the true ones, averaged over the states where they differ.
    """
    mock_lm(5, initializer_range=0.02).save_pretrained(tmp_path)
    letter_tokenizer(5).save_pretrained(tmp_path)

    def likeness(algorithm: Any, policy: Any, seed: int, sign: float = 1.0, **changes: Any) -> float:
        env = make_vec_env(
            "textgym/Text-v0",
            n_envs=8,
            prompts=["c"],
            tokenizer=str(tmp_path),
            reward=lambda completions: [sign * WORTH.get(text, 0.0) for text in completions],
            max_prompt_tokens=1,
            max_new_tokens=2,
        )
        settings = {
            "policy_kwargs": {"model": str(tmp_path)},
            "learning_rate": 1e-2,
            "batch_size": 64,
            "train_freq": 2,
            "exploration_fraction": 0.8,
            "target_update_interval": 40,
            "learning_starts": 80,
            "seed": seed,
        }
        model = make_q(env, algorithm, policy, **settings | changes).learn(1600)
        correlations = []
        for text, truth in values_of(WORTH).items():
            observation = env.reset()
            if text:
                observation, *_ = env.step(np.full(8, LETTERS.index(text)))
            with torch.no_grad():
                values = network(model)({key: torch.as_tensor(value[:1]) for key, value in observation.items()})
            values = (values if algorithm is DQN else values.mean(1))[0]  # (V,)
            correlations.append(np.corrcoef(values.numpy(), truth)[0, 1])
        return float(np.mean(correlations))

    return likeness


LIKENESS = {
    DQN: Measured(mean=0.809, standard_deviation=0.065, runs=9),
    QRDQN: Measured(mean=0.767, standard_deviation=0.082, runs=9),
}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "policy"), BOTH)
def test_learns_the_best_of_a_few_texts(algorithm: Any, policy: Any, likeness: Any) -> None:
    """Untrained values correlate by -0.35."""
    gains = [likeness(algorithm, policy, seed) for seed in range(2)]
    assert_learns(gains, at_least=0.2, measured=LIKENESS[algorithm])


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "policy"), BOTH)
def test_what_does_not_learn_or_has_flipped_rewards_is_told_apart(algorithm: Any, policy: Any, likeness: Any) -> None:
    assert likeness(algorithm, policy, 0, learning_rate=0.0) < 0.0
    assert likeness(algorithm, policy, 0, sign=-1.0) < 0.0


def test_a_q_function_starts_from_the_folder_of_an_adapter(make_env: MakeEnv, lm_folder: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = AutoModelForCausalLM.from_pretrained(lm_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(lm, config)
    adapted.save_pretrained(tmp_path)
    model = DQN(TextQPolicy, make_env(1, kl_mode="reference"), policy_kwargs={"model": str(tmp_path)})
    ids = torch.arange(6)[None]
    plain, explorer = model.policy.online.model.lm, model.policy.explorer.actor.lm
    for started in (plain, explorer):
        torch.testing.assert_close(started(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert all(weight.requires_grad for weight in plain.parameters()), "the whole model is trained"
