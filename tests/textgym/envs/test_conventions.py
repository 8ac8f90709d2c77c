"""What Gymnasium promises of any environment: seeds, options, actions, masks, limits of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym  # noqa: F401  (registers the ids)
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.errors import ConfigError, UnknownArgumentError
from textgym.models.actor_critic import ActorCritic
from textgym.testing import mock_lm
from textgym.wrappers import TopKActions, VectorTopKActions

NO_ACTIONS = [1.5, 5.0, np.float32(5), "5", True, np.bool_(True), None, torch.tensor(5.0), [5, 6], np.nan]
NO_BATCHES = [[1.5, 2], ["5", "6"], [True, False], None, np.array([5.0, 6.0]), torch.tensor([5.0, 6.0]), 5, [[5], [6]]]


@pytest.mark.parametrize("action", NO_ACTIONS, ids=repr)
def test_an_action_that_is_no_token_id_is_refused(settings: dict[str, Any], action: Any) -> None:
    for env in (TextEnv(**settings), TopKActions(TextEnv(**settings), k=8)):
        env.reset()
        with pytest.raises(ValueError, match="whole number"):
            env.step(action)


@pytest.mark.parametrize("actions", NO_BATCHES, ids=repr)
def test_a_batch_of_actions_that_are_no_token_ids_is_refused(settings: dict[str, Any], actions: Any) -> None:
    for envs in (TextVectorEnv(2, **settings), VectorTopKActions(TextVectorEnv(2, **settings), k=8)):
        envs.reset()
        with pytest.raises(ValueError, match=r"whole numbers|one action for each of the 2 rows"):
            envs.step(actions)


@pytest.mark.parametrize(
    "action", [5, np.int64(5), np.uint8(5), np.array(5), np.array([5]), torch.tensor(5), torch.tensor([5])], ids=repr
)
def test_every_kind_of_whole_number_is_an_action(settings: dict[str, Any], action: Any) -> None:
    env = TextEnv(**settings)
    env.reset(options={"prompt_index": 2})
    assert env.step(action)[0]["input_ids"][1] == 5


@pytest.mark.parametrize(
    "options", [{"promt_index": 1}, {"prompt_index": 1, "colour": 2}, {"seed": 3}, "prompt_index", [1]], ids=repr
)
def test_unknown_options_of_reset_are_refused(settings: dict[str, Any], options: Any) -> None:
    for env in (TextEnv(**settings), TextVectorEnv(1, **settings)):
        with pytest.raises(ValueError, match=r"reset (has no option|takes options as a dict)"):
            env.reset(options=options)


def test_a_reset_mask_is_for_rows_of_a_batch(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reset has no option 'reset_mask'"):
        TextEnv(**settings).reset(options={"reset_mask": np.array([True])})
    with pytest.raises(ValueError, match="must be a bool array of shape"):
        TextVectorEnv(2, **settings).reset(options={"reset_mask": np.array([True])})


@pytest.mark.parametrize("choice", [1.5, True, "1", None, [0, 1], -1, 5], ids=repr)
def test_a_prompt_index_that_is_no_index_is_refused(settings: dict[str, Any], choice: Any) -> None:
    for env in (TextEnv(**settings), TextVectorEnv(1, **settings)):
        with pytest.raises(ValueError, match="must hold 1 whole numbers from 0 to 4"):
            env.reset(options={"prompt_index": choice})


@pytest.mark.parametrize(("seed", "known"), [(5, 5), (np.int64(5), 5), ([4, 5], -1), (np.array([4, 5]), -1)])
def test_reading_the_seed_leaves_the_generator(settings: dict[str, Any], seed: Any, known: int) -> None:
    envs, twin = TextVectorEnv(2, **settings), TextVectorEnv(2, **settings)
    envs.reset(seed=seed)
    twin.reset(seed=seed)
    generator = envs.np_random
    assert envs.np_random_seed == known
    assert envs.np_random is generator
    assert envs.np_random.integers(10**9) == twin.np_random.integers(10**9)


def test_a_seed_is_the_same_whatever_kind_of_integer_it_is(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(4, **settings)
    first, again = (envs.reset(seed=seed)[0]["input_ids"] for seed in (5, np.int64(5)))
    np.testing.assert_array_equal(first, again)


def test_masks_in_infos_are_those_that_spaces_sample_by(settings: dict[str, Any]) -> None:
    masked = {**settings, "info_action_mask": True, "action_mask": only_letters}
    env, envs = TextEnv(**masked), TextVectorEnv(2, **masked)
    for single, many in ((env, envs), (TopKActions(env, k=9), VectorTopKActions(envs, k=9))):
        mask = single.reset(seed=0)[1]["action_mask"]
        masks = many.reset(seed=0)[1]["action_mask"]
        assert mask[single.action_space.sample(mask)] == 1
        assert (masks[[0, 1], many.action_space.sample(tuple(masks))] == 1).all()
    assert env.action_masks().dtype == bool


def test_a_policy_takes_the_masks_of_infos(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(64, **{**settings, "info_action_mask": True, "action_mask": only_letters})
    policy = ActorCritic(mock_lm())
    policy.seed(0)
    observations, infos = envs.reset(seed=0)
    actions = policy.act(observations, action_masks=infos["action_mask"]).action
    assert set(actions.tolist()) <= set(range(97, 123))


def only_letters(observation: Any) -> torch.Tensor:
    allowed = torch.zeros(len(observation["input_ids"]), 258, dtype=torch.bool)
    allowed[:, 97:123] = True
    return allowed


def test_a_mask_that_allows_nothing_is_refused_while_an_episode_goes_on(settings: dict[str, Any]) -> None:
    def at_most_two(observation: Any) -> torch.Tensor:
        lengths = torch.as_tensor(observation["attention_mask"]).sum(-1, keepdim=True)
        return only_letters(observation) & (lengths < 3)

    env = TextEnv(**{**settings, "action_mask": at_most_two, "max_new_tokens": 5})
    env.reset(options={"prompt_index": 2})
    env.step(97)
    env.step(97)
    with pytest.raises(ValueError, match="action_mask allows no token in row 0, after 'aa'"):
        env.action_masks()
    short = TextEnv(**{**settings, "action_mask": at_most_two, "max_new_tokens": 2})
    short.reset(options={"prompt_index": 2})
    short.step(97)
    assert short.step(97)[2], "a row that has ended may have no actions left"
    with pytest.raises(ValueError, match="allow no token"):
        ActorCritic(mock_lm()).act(env.reset()[0], action_masks=np.zeros(258, dtype=np.int8))


def test_a_mask_of_another_vocabulary_is_refused(settings: dict[str, Any]) -> None:
    env = TextEnv(**{**settings, "action_mask": lambda observation: torch.ones(1, 300, dtype=torch.bool)})
    env.reset()
    with pytest.raises(ValueError, match=r"must return a bool array of shape \(1, 258\).* got \(1, 300\)"):
        env.action_masks()


@pytest.fixture
def limited(settings: dict[str, Any]) -> Iterator[str]:
    """An id that is registered with a limit of steps."""
    places = {"entry_point": "textgym.envs.text:TextEnv", "vector_entry_point": "textgym.envs.vector:TextVectorEnv"}
    gym.register("own/Limited-v0", **places, max_episode_steps=2, kwargs=settings)
    yield "own/Limited-v0"
    del gym.registry["own/Limited-v0"]


def test_a_limit_of_steps_that_would_leave_the_score_unpaid_is_refused(limited: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"registered with max_episode_steps.* max_new_tokens limits a response"):
        gym.make(limited)
    with pytest.raises(UnknownArgumentError, match=r"takes no max_episode_steps.* max_new_tokens limits a response"):
        gym.make_vec(limited, num_envs=2)
    with pytest.raises(UnknownArgumentError, match="takes no max_episode_steps"):
        gym.make_vec("textgym/Text-v0", num_envs=2, max_episode_steps=2, **settings)
