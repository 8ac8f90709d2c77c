"""TextVectorEnv: the autoreset modes, and equality with TextEnv row by row."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.models.actor_critic import ActorCritic
from textgym.testing import assert_close, mock_lm, terms_of, tolerance

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())
LOG_PROB = 8.0  # the size of the mock model's log-probs
ROUNDING = tolerance(FORWARD, scale=LOG_PROB)

EOS = 256
MODES = list(AutoresetMode)


def scripted(steps: int, rows: int, seed: int = 0) -> np.ndarray:
    """Actions with an EOS now and then."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((steps, rows)) < 0.2, EOS, rng.integers(97, 123, (steps, rows)))


@pytest.mark.parametrize("mode", MODES)
def test_each_end_is_delivered_once_to_the_right_episode(settings: dict[str, Any], mode: AutoresetMode) -> None:
    """Against Gymnasium's own SyncVectorEnv over one-row environments, fed the same prompts and actions."""
    rows, steps = 3, 40
    envs = TextVectorEnv(rows, **settings, autoreset_mode=mode)
    singles = [TextEnv(**settings) for _ in range(rows)]

    def pinned(row: int) -> gym.Env[Any, Any]:
        """The single environment of a row, always reset to the prompt that the vector row drew."""

        class Pinned(gym.Wrapper):
            def reset(self, *, seed: Any = None, options: Any = None) -> Any:
                return self.env.reset(options={"prompt_index": int(envs.task.current[row])})

        return Pinned(singles[row])

    observations, _ = envs.reset(seed=5)
    others = SyncVectorEnv([lambda row=row: pinned(row) for row in range(rows)], autoreset_mode=mode)
    others.reset()
    ends = 0
    for actions in scripted(steps, rows):
        mine, theirs = envs.step(actions), others.step(actions)
        for key in mine[0]:
            np.testing.assert_array_equal(mine[0][key], theirs[0][key])
        assert_close(mine[1], theirs[1], terms=FORWARD, scale=LOG_PROB)
        np.testing.assert_array_equal(mine[2], theirs[2])
        np.testing.assert_array_equal(mine[3], theirs[3])
        compare_infos(mine[4], theirs[4])
        done = mine[2] | mine[3]
        ends += int(done.sum())
        if mode == AutoresetMode.DISABLED and done.any():
            options = {"reset_mask": done}
            observations, _ = envs.reset(options=options)
            assert options["reset_mask"] is done, "read, not popped"
            expected, _ = others.reset(options={"reset_mask": done})
            np.testing.assert_array_equal(observations["input_ids"], expected["input_ids"])
    assert ends > 20
    assert envs.autoreset_mode == envs.metadata["autoreset_mode"] == mode
    assert "autoreset_mode" not in TextVectorEnv.metadata


def compare_infos(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        if isinstance(value, dict):
            compare_infos(value, theirs[key])
        elif key == "final_obs":
            for row, observation in enumerate(value):
                assert (observation is None) == (theirs[key][row] is None)
                if observation is not None:
                    np.testing.assert_array_equal(observation["input_ids"], theirs[key][row]["input_ids"])
        else:
            assert_close(value.astype(float), theirs[key].astype(float), terms=FORWARD, scale=LOG_PROB)


def test_disabled_rows_wait(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **settings, autoreset_mode="Disabled")
    envs.reset(seed=0)
    first = envs.step([EOS, 97])
    second = envs.step([98, 98])
    np.testing.assert_array_equal(second[0]["input_ids"][0], first[0]["input_ids"][0])
    assert second[1][0] == 0
    assert not second[2][0]
    with pytest.raises(ValueError, match="must be a bool array of shape"):
        envs.reset(options={"reset_mask": np.array([1, 0])})


def test_all_ends_of_a_step_are_scored_in_one_call(settings: dict[str, Any]) -> None:
    calls = []

    def reward(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    envs = TextVectorEnv(4, **{**settings, "reward": reward})
    envs.reset(seed=0)
    envs.step([97, EOS, EOS, 97])
    envs.step([EOS, 97, 97, EOS])
    assert calls == [2, 2]


def test_torch_arrays_stay_tensors(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **settings, array="torch")
    observations, _ = envs.reset(seed=0)
    results = envs.step(torch.tensor([97, 98]))
    assert all(isinstance(x, torch.Tensor) for x in (*observations.values(), *results[0].values(), *results[1:4]))
    observations["input_ids"].zero_()
    assert (envs.step(torch.tensor([97, 98]))[0]["input_ids"][:, 0] != 0).all(), "observations are fresh"


@pytest.mark.parametrize("restricted", [0, 3])
def test_slow_and_fast_paths_agree(settings: dict[str, Any], restricted: int) -> None:
    """One set of episodes through TextEnv (exact KL), TextVectorEnv (exact KL), and the agents' batched path."""
    from textgym.agents.common.advantages import gae
    from textgym.agents.common.rollout import collect
    from textgym.rewards.kl import KLPenalty

    rows = 4
    settings |= {"min_new_tokens": restricted, "missing_eos_penalty": 0.5}
    policy = ActorCritic.from_pretrained(mock_lm(seed=9))
    torch.nn.init.normal_(policy.value_head.weight)
    policy.seed(0)
    deferred = TextVectorEnv(rows, **settings, kl_mode="deferred", autoreset_mode="Disabled", array="torch")
    deferred.reset(seed=0)
    rollout = collect(deferred, policy)
    prompts = deferred.task.current.copy()
    kl = KLPenalty(settings["reference"], 0.1).of_sequences(policy, rollout.sequences, rollout.log_probs)
    fast = rollout.rewards - 0.1 * kl
    tokens = rollout.sequences.pad(rollout.sequences.actions)
    lengths = rollout.sequences.response_lengths.tolist()

    vector = TextVectorEnv(rows, **settings, kl_mode="exact", autoreset_mode="Disabled")
    vector.attach_policy(policy)
    vector.reset(options={"prompt_index": prompts})
    stepped = np.stack([vector.step(tokens[:, t])[1] for t in range(tokens.shape[1])], 1)

    rewards = torch.zeros_like(fast)
    values = torch.zeros_like(fast)
    for row in range(rows):
        env = TextEnv(**settings, kl_mode="exact")
        env.attach_policy(policy)
        observation, _ = env.reset(options={"prompt_index": int(prompts[row])})
        for t in range(lengths[row]):
            masks = env.action_masks()
            log_prob = policy.log_prob(observation, int(tokens[row, t]), masks)
            values[row, t] = policy.act(observation).value
            assert_close(log_prob, rollout.log_probs[row, t], terms=FORWARD, scale=LOG_PROB)
            observation, rewards[row, t], terminated, _, info = env.step(int(tokens[row, t]))
        assert terminated
        assert info["kl"] == pytest.approx(kl[row].sum().item(), abs=ROUNDING)
        assert info["score"] == pytest.approx(rollout.scores[row].item(), abs=ROUNDING)
    mask = rollout.response_mask
    assert_close(rewards, fast, terms=FORWARD, scale=LOG_PROB)
    assert_close(stepped, fast, terms=FORWARD, scale=LOG_PROB)
    slow_advantages, _ = gae(rewards, values, mask, 0.99, 0.95)
    fast_advantages, _ = gae(fast, rollout.values, mask, 0.99, 0.95)
    assert_close(slow_advantages, fast_advantages, terms=FORWARD, scale=LOG_PROB)


def test_vector_seeding(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(3, **settings)

    def prompts() -> list[int]:
        envs.reset(seed=4)
        drawn = envs.task.current.tolist()
        for actions in scripted(12, 3):
            envs.step(actions)
            drawn += envs.task.current.tolist()
        return drawn

    before = torch.get_rng_state()
    assert prompts() == prompts()
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_input_is_explained(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **settings)
    with pytest.raises(gym.error.ResetNeeded, match=r"call envs.reset\(\)"):
        envs.step([97, 97])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="one action for each of the 2 rows"):
        envs.step([97])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        envs.step([97, 258])
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        TextVectorEnv(0, **settings)
    with pytest.raises(ValueError, match="array must be"):
        TextVectorEnv(2, **settings, array="jax")
