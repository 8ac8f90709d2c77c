"""Environments on a GPU give what those on a CPU give, and everything they give is on the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from textgym.agents import PPO, PPOConfig
from textgym.games.game_env import GameVectorEnv
from textgym.models.distributions.masks import TopPMask
from textgym.models.token_model import TokenModel
from textgym.rewards.models.reward_model import RewardModel
from textgym.testing import byte_tokenizer, mock_lm
from textgym.wrappers import (
    HiddenStateObservation,
    TokenHistory,
    TopKActions,
    VectorHiddenStateObservation,
    VectorTopKActions,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"min_new_tokens": 2, "info_action_mask": True, "info_text": True},
    "stopped by text": {"stop": [".", "z"], "score_scaling": "running"},
    "paying the KL": {"kl_mode": "reference", "kl_coef": 0.1},
    "cut off": {"length_limit": "truncate", "kl_mode": "exact", "kl_coef": 0.1},
}


@pytest.fixture
def paying_envs(text_envs: Callable[..., Any]) -> Callable[..., Any]:
    """Environments that may pay the KL to always the same model, on their device."""

    def make(device: str, **kwargs: Any) -> Any:
        if kwargs.get("kl_mode") in ("reference", "exact"):
            kwargs["reference"] = TokenModel.load(mock_lm(), device=device)
        return text_envs(device, **{"num_envs": 3, "max_new_tokens": 4, "array": "numpy", **kwargs})

    return make


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(
    ("settings", "array"),
    [(settings, array) for settings, array in zip(SETTINGS.values(), itertools.cycle(["torch", "numpy"]))]
    + [(SETTINGS["masked"], "torch")],
)
def test_steps_equal_those_on_a_cpu(
    settings: dict[str, Any],
    array: str,
    mode: AutoresetMode,
    paying_envs: Callable[..., Any],
    same: Callable[..., None],
) -> None:
    both = {name: paying_envs(name, array=array, autoreset_mode=mode, **settings) for name in ("cuda", "cpu")}
    if settings.get("kl_mode") == "exact":
        for device, envs in both.items():
            envs.unwrapped.attach_policy(TokenModel.load(mock_lm(seed=1), device=device))
    same(*(envs.reset(seed=0)[0] for envs in both.values()))
    rng = np.random.default_rng(0)
    for step in range(6):
        actions = rng.integers(97, 123, 3)
        if step == 2:
            actions[0] = 256  # ends the row
        given, expected = (
            envs.step(torch.as_tensor(actions, device=device) if array == "torch" else actions)
            for device, envs in both.items()
        )
        for ours, theirs in zip(given[:4], expected[:4], strict=True):
            same(ours, theirs)
        assert set(given[4]) == set(expected[4])
        if array == "torch":
            assert {x.device.type for x in (*given[0].values(), *given[1:4])} == {"cuda"}
    same(both["cuda"].unwrapped.action_masks(), both["cpu"].unwrapped.action_masks())


def len_of(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_a_single_environment_on_a_gpu() -> None:
    env = gym.make(
        "textgym/Text-v0", prompts=["ab"], tokenizer=byte_tokenizer(), reward=len_of, max_new_tokens=3, device="cuda"
    )
    env.reset(seed=0)
    steps = [env.step(97) for _ in range(3)]
    assert [step[2] for step in steps] == [False, False, True]
    assert steps[-1][1] == 3.0


def test_some_rows_are_reset(paying_envs: Callable[..., Any]) -> None:
    envs = paying_envs("cuda", array="torch", autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    envs.step(torch.full((3,), 97, device="cuda"))
    before = envs.unwrapped.task.episodes.lengths.tolist()
    envs.reset(options={"reset_mask": torch.tensor([True, False, False], device="cuda"), "prompt_index": [2]})
    assert envs.unwrapped.task.episodes.lengths.tolist() == [3, *before[1:]]


@pytest.mark.parametrize(
    "mask",
    [
        lambda observation: np.ones((len(observation["input_ids"]), 258), bool),
        lambda observation: torch.ones(len(observation["input_ids"]), 258, dtype=torch.bool),
        lambda observation: torch.ones(
            len(observation["input_ids"]), 258, dtype=torch.bool, device=observation["input_ids"].device
        ),
    ],
    ids=["numpy", "on the CPU", "on the GPU"],
)
def test_a_mask_may_be_an_array_or_on_either_device(mask: Callable[..., Any], paying_envs: Callable[..., Any]) -> None:
    envs = paying_envs("cuda", action_mask=mask, info_action_mask=True)
    envs.reset(seed=0)
    _, _, _, _, infos = envs.step(np.array([97, 98, 99]))
    assert infos["action_mask"].shape == (3, 258)


def test_a_mask_by_a_model_elsewhere_is_that_of_a_cpu(paying_envs: Callable[..., Any]) -> None:
    given, expected = (
        paying_envs(device, action_mask=TopPMask(mock_lm(), 0.5), info_action_mask=True) for device in ("cuda", "cpu")
    )
    masks = [envs.reset(seed=0)[1]["action_mask"] for envs in (given, expected)]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_views_of_the_state(array: str, paying_envs: Callable[..., Any], same: Callable[..., None]) -> None:
    def views(device: str) -> Any:
        envs = paying_envs(device, array=array, kl_mode="reference", kl_coef=0.1)
        return VectorTopKActions(VectorHiddenStateObservation(envs), 4)

    given, expected = views("cuda"), views("cpu")
    same(given.reset(seed=0)[0], expected.reset(seed=0)[0])
    for _ in range(5):
        steps = [envs.step(np.array([1, 2, 3])) for envs in (given, expected)]
        same(steps[0][0], steps[1][0])


def test_views_of_a_single_environment() -> None:
    def make() -> gym.Env[Any, Any]:
        settings = {"prompts": ["ab"], "tokenizer": byte_tokenizer(), "reward": len_of, "max_new_tokens": 3}
        reference = TokenModel.load(mock_lm(), device="cuda")
        return gym.make(
            "textgym/Text-v0", device="cuda", kl_mode="reference", kl_coef=0.1, reference=reference, **settings
        )

    for env in (
        HiddenStateObservation(make()),
        TopKActions(HiddenStateObservation(make()), 4),
        TokenHistory(make(), 4),
    ):
        env.reset(seed=0)
        env.step(1)


class Repeats:
    """A game of three turns, whose player may say anything."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return f"{seed}?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return ">", float(len(action)), self.turn == 3, False, {}


@pytest.mark.usefixtures("the_cpus_numbers")
def test_games_train_as_on_a_cpu(same: Callable[..., None], tiny_policy: Callable[..., Any]) -> None:
    results = []
    for device in ("cuda", "cpu"):
        envs = GameVectorEnv(
            4, Repeats, byte_tokenizer(), device=device, max_prompt_tokens=6, max_new_tokens=16, kl_mode="deferred"
        )
        seen: list[dict[str, float]] = []
        agent = PPO(tiny_policy(device), envs, PPOConfig(episodes_per_update=4, minibatch_size=4, num_epochs=1))
        agent.learn(8, [lambda agent, metrics, seen=seen: seen.append(metrics)])
        results.append(seen)
    same(*([{k: v for k, v in row.items() if not k.startswith("time")} for row in seen] for seen in results))


def test_a_reward_model_may_be_on_another_device(paying_envs: Callable[..., Any], same: Callable[..., None]) -> None:
    model = {device: RewardModel.from_pretrained("tiny", device=device) for device in ("cuda", "cpu")}
    prompts, completions = ["The film"] * 3, [" is good", " is", " bad and long"]
    same(model["cuda"](prompts, completions), model["cpu"](prompts, completions))
    for where in ("cuda", "cpu"):
        envs = paying_envs(where, reward=[model["cuda"], model["cpu"]], max_new_tokens=2)
        envs.reset(seed=0)
        rewards = [envs.step(np.array([97, 98, 99]))[1] for _ in range(2)]
        assert np.isfinite(rewards[-1]).all()
        assert np.asarray(rewards[-1]).any()
