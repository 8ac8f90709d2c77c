"""TokenSpace, and what the environments' action masks do with it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import PPO, PPOConfig
from textgym.envs.spaces import TokenSpace
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.distributions.masks import TopKMask
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import assert_close, mock_lm, terms_of

FORWARD = terms_of(mock_lm())
LOG_PROB = 8.0  # the size of the mock model's log-probs


def test_equals_discrete() -> None:
    space = TokenSpace(7, StopRule((3,), 2))
    assert space == gym.spaces.Discrete(7)
    assert gym.spaces.Discrete(7) == space
    assert space != gym.spaces.Discrete(8)
    assert str(space) == "Discrete(7)"


def test_a_space_that_was_pickled_before_its_modules_moved_is_read() -> None:
    space = TokenSpace(7, StopRule((3,), 2))
    written = pickle.dumps(space, protocol=0)
    old = written.replace(b"textgym.models.distributions.log_probs", b"textgym.models.log_probs")
    assert old != written
    assert pickle.loads(old).stop == space.stop


def test_samples_by_its_explorer() -> None:
    space = TokenSpace(7)
    space.seed(0)
    assert {int(space.sample()) for _ in range(200)} == set(range(7))
    space.explorer = lambda: 4
    assert {int(space.sample()) for _ in range(20)} == {4}
    only = np.zeros(7, dtype=np.int8)
    only[2] = 1
    assert int(space.sample(mask=only)) == 2
    space.explorer = lambda: None
    assert len({int(space.sample()) for _ in range(50)}) > 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda space: pickle.loads(pickle.dumps(space))])
def test_copies_keep_plain_facts_alone(copied: Any) -> None:
    space = TokenSpace(7, StopRule((3,), 2), "agent", TopKMask(mock_lm(), k=3))
    space.explorer, space.observation, space.temperature = (lambda: 4), {}, 0.5
    space.pay_kl("this test")
    twin = copied(space)
    assert (twin, twin.stop, twin.kl_payer) == (space, space.stop, "agent")
    assert (twin.explorer, twin.observation, twin.action_mask, twin.agent_pays) == (None, None, None, False)


def test_says_who_pays_the_kl(settings: dict[str, Any]) -> None:
    def payer(**changes: Any) -> str:
        return TextEnv(**{**settings, **changes}).task.action_space.kl_payer

    assert payer() == payer(kl_mode="exact") == "environment"
    assert payer(kl_mode="deferred") == payer(kl_mode="deferred", kl_coef=AdaptiveKL(6)) == "agent"
    assert payer(kl_mode="deferred", reference=None) == "agent"  # to the agent's own start
    assert payer(kl_coef=0.0) == payer(kl_coef=0.0, kl_mode="deferred") == "nobody"


def even_after_odd(observation: Any) -> torch.Tensor:
    last = observation["input_ids"].gather(1, observation["attention_mask"].sum(1, keepdim=True) - 1)
    return (last + torch.arange(258)) % 2 == 1


def test_action_mask_narrows_the_action_masks(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings, action_mask=even_after_odd, min_new_tokens=2, info_action_mask=True)
    _, info = env.reset(options={"prompt_index": 2})  # "a", 97: odd
    masks = env.action_masks()
    np.testing.assert_array_equal(masks, info["action_mask"])
    assert masks[:256:2].all()
    assert not masks[1::2].any()
    assert not masks[256]  # the stop token is even, and too early
    env.step(98)
    assert env.action_masks()[1:256:2].all()


def test_reference_is_masked_as_the_actions_are(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **settings, action_mask=even_after_odd)
    observation, _ = envs.reset(options={"prompt_index": [2, 2]})
    _, rewards, *_ = envs.step([98, 100])
    logits = mock_lm()(input_ids=torch.as_tensor(observation["input_ids"][:1, :1])).logits[0, -1]
    masked = logits[torch.arange(258) % 2 == 0].log_softmax(-1)
    assert_close(rewards, 0.1 * masked[[49, 50]].detach(), terms=FORWARD, scale=LOG_PROB)


@pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")  # tested in test_kl.py
def test_vector_rows_equal_single_environments(settings: dict[str, Any]) -> None:
    mask = TopKMask(mock_lm(), k=9)
    envs = TextVectorEnv(3, **settings, action_mask=mask)
    single = TextEnv(**settings, action_mask=mask)
    envs.reset(options={"prompt_index": [0, 1, 2]})
    for row in range(3):
        single.reset(options={"prompt_index": row})
        np.testing.assert_array_equal(envs.action_masks()[row], single.action_masks())


def test_agents_that_cannot_mask_refuse(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **settings, kl_mode="deferred", action_mask=even_after_odd)
    with pytest.raises(ValueError, match="does not know the environment's action_mask"):
        PPO(ActorCritic(mock_lm()), envs, PPOConfig(episodes_per_update=2))
