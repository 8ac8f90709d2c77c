"""How often the host waits for the GPU, at most: each time costs 10 to 30 microseconds, and the queue runs dry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from textgym.agents import PPO, PPOConfig
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.rewards.models.reward_model import RewardModel

Counting = Callable[[], AbstractContextManager[Counter[str]]]
TOKENS = 64


def shown(seen: Counter[str]) -> str:
    return "\n".join(f"{number} x {what}" for what, number in seen.most_common())


def test_choosing_a_token_does_not_wait(
    syncs: Counting, make_policy: Callable[..., ActorCritic], make_envs: Callable[..., Any]
) -> None:
    policy, envs = make_policy(), make_envs(min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    observation, _ = envs.reset(seed=0)
    for _ in range(2):
        observation, *_ = envs.step(policy.act(observation).action)
    with syncs() as seen:
        for _ in range(10):
            policy.act(observation)
    assert seen.total() == 0, shown(seen)


@pytest.mark.parametrize(("array", "most"), [("torch", 1), ("numpy", 3)])
def test_a_step_of_the_environment_waits_seldom(
    array: str, most: int, syncs: Counting, make_policy: Callable[..., ActorCritic], make_envs: Callable[..., Any]
) -> None:
    policy, envs = make_policy(), make_envs(min_new_tokens=TOKENS, max_new_tokens=TOKENS, array=array)
    observation, _ = envs.reset(seed=0)
    for _ in range(2):
        observation, *_ = envs.step(policy.act(observation).action)
    with syncs() as seen:
        for _ in range(10):
            observation, *_ = envs.step(policy.act(observation).action)
    assert seen.total() <= 10 * most, shown(seen)


def test_captured_generation_waits_every_tenth_token(syncs: Counting, tiny_policy: Callable[..., ActorCritic]) -> None:
    policy, ids = tiny_policy(), torch.randint(3, 50, (8, 96), device="cuda")
    lengths, stop = torch.arange(3, 11, device="cuda"), StopRule((256,), TOKENS)
    policy.generate(ids, lengths, TOKENS, stop)  # captures
    with syncs() as seen:
        policy.generate(ids, lengths, TOKENS, stop)
    assert seen.total() <= 0.1 * TOKENS, shown(seen)


@pytest.fixture(scope="module")
def agent(make_policy: Callable[..., ActorCritic], make_envs: Callable[..., Any]) -> PPO:
    """PPO with a reward model that has made two updates of 8 episodes of 16 tokens."""
    reward = RewardModel.from_pretrained("tiny", device="cuda")
    envs = make_envs(num_envs=8, max_new_tokens=16, min_new_tokens=16, kl_coef=0.1, reward=reward)
    config = PPOConfig(episodes_per_update=8, minibatch_size=4, num_epochs=1)
    return PPO(make_policy(), envs, config).learn(16)


def test_a_rollout_waits_twelve_times(syncs: Counting, agent: PPO) -> None:
    with syncs() as seen:
        agent.play()
    assert seen.total() <= 12, shown(seen)


def test_a_minibatch_waits_four_times(syncs: Counting, agent: PPO) -> None:
    rollout = agent.play()
    kl = agent.measure_kl(rollout)
    with syncs() as seen:
        agent.update(rollout, kl)
    assert seen.total() <= 2 * 4, shown(seen)
