"""TopKActions: ranks are those of the model, the KL stays that of the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.testing import mock_lm, terms_of, tolerance
from textgym.wrappers import HiddenStateObservation, TopKActions, VectorHiddenStateObservation, VectorTopKActions

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs

EOS = 256


def log_probs_of(lm: Any, ids: list[int]) -> torch.Tensor:
    """Of the token after the text, by one full pass."""
    with torch.no_grad():
        return lm(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def context(observation: dict[str, np.ndarray]) -> list[int]:
    return observation["input_ids"][: observation["attention_mask"].sum()].tolist()


@pytest.mark.parametrize("other", [None, mock_lm(seed=3)])
def test_action_i_is_the_ith_likeliest_token_and_the_reference_is_paid(settings: dict[str, Any], other: Any) -> None:
    env = TopKActions(TextEnv(**settings), k=7, model=other)
    observation, _ = env.reset(options={"prompt_index": 1})
    for rank in (0, 6, 3):
        ids = context(observation)
        ranking = log_probs_of(other or settings["reference"], ids).argsort(descending=True)
        observation, reward, *_ = env.step(rank)
        assert context(observation) == [*ids, int(ranking[rank])]
        assert reward == pytest.approx(
            0.1 * float(log_probs_of(settings["reference"], ids)[ranking[rank]]), abs=ROUNDING
        )


def test_stop_tokens_that_are_not_allowed_yet_are_not_offered(settings: dict[str, Any]) -> None:
    env = TopKActions(TextEnv(**{**settings, "min_new_tokens": 1, "info_action_mask": True}), k=258)
    _, info = env.reset(seed=0)
    assert EOS not in env.candidates.tokens()[0, :-1]
    assert info["action_mask"].tolist() == env.action_masks().tolist() == [True] * 257 + [False]
    env.step(0)
    assert env.action_masks().all()


class RanksByHiddenState:
    """A policy of both views, whose observations must be hidden states and whose actions must be ranks."""

    def __init__(self, dimension: int, k: int) -> None:
        self.layer = torch.nn.Linear(dimension, k)

    def log_prob(self, observation: Any, action: Any, action_masks: Any = None) -> torch.Tensor:
        logits = self.layer(torch.as_tensor(observation)).detach()
        if action_masks is not None:
            logits = logits.masked_fill(~torch.as_tensor(action_masks), -torch.inf)
        return logits.log_softmax(-1).gather(1, torch.as_tensor(action)[:, None])[:, 0]


@pytest.mark.parametrize("min_new_tokens", [0, 1])
@pytest.mark.parametrize("top_k_inside", [True, False])
def test_exact_kl_of_a_policy_that_sees_only_the_views(
    settings: dict[str, Any], top_k_inside: bool, min_new_tokens: int
) -> None:
    base = TextEnv(**{**settings, "kl_mode": "exact", "min_new_tokens": min_new_tokens})
    env: Any = (
        HiddenStateObservation(TopKActions(base, 4)) if top_k_inside else TopKActions(HiddenStateObservation(base), 4)
    )
    policy = RanksByHiddenState(32, 4)
    env.attach_policy(policy)
    observation, _ = env.reset(options={"prompt_index": 2})
    for rank in (1, 3):
        state = context({key: value[0].numpy() for key, value in base.task.episodes.observation().items()})
        reference = log_probs_of(settings["reference"], state)
        if len(state) == 1 and min_new_tokens:
            reference[EOS] = -torch.inf
            reference = reference.log_softmax(-1)
        token = int(reference.argsort(descending=True)[rank])
        expected = policy.log_prob(observation[None], [rank]) - reference[token]
        observation, reward, *_ = env.step(rank)
        assert reward == pytest.approx(-0.1 * float(expected), abs=ROUNDING)


def test_a_row_equals_the_single_environment_in_every_autoreset_mode(settings: dict[str, Any]) -> None:
    actions = np.random.default_rng(0).integers(0, 6, (12, 3))
    envs = VectorTopKActions(TextVectorEnv(3, **settings, autoreset_mode="SameStep"), k=6)
    single = TopKActions(TextEnv(**settings), k=6)
    for row in range(3):
        envs.reset(options={"prompt_index": [0, 1, 2]})
        single.reset(options={"prompt_index": row})
        for step in actions:
            observations, rewards, terminated, _, infos = envs.step(step)
            observation, reward, ended, _, _ = single.step(int(step[row]))
            assert (rewards[row], terminated[row]) == (pytest.approx(reward, abs=ROUNDING), ended)
            seen = infos["final_obs"][row] if ended else {key: value[row] for key, value in observations.items()}
            assert context(seen) == context(observation)
            if ended:
                break
        assert ended


def test_arrays_stay_tensors(settings: dict[str, Any]) -> None:
    envs = VectorTopKActions(VectorHiddenStateObservation(TextVectorEnv(2, **settings, array="torch")), k=3)
    observations, _ = envs.reset(seed=0)
    assert isinstance(observations, torch.Tensor)
    assert isinstance(envs.action_masks(), torch.Tensor)
    assert isinstance(envs.step(torch.tensor([0, 1]))[0], torch.Tensor)


def test_what_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="k must be between 1 and 258"):
        TopKActions(TextEnv(**settings), k=259)
    with pytest.raises(ValueError, match="kl_mode='reference' or 'exact'"):
        TopKActions(TextEnv(**{**settings, "kl_mode": "deferred"}), k=2)
    with pytest.raises(ValueError, match=r"TopKActions\(env, ..., model='tiny'\)"):
        TopKActions(TextEnv(**{**settings, "reference": None, "kl_coef": 0.0}), k=2)
    env = TopKActions(TextEnv(**settings), k=2)
    env.reset()
    with pytest.raises(ValueError, match="actions must be between 0 and 1"):
        env.step(2)
