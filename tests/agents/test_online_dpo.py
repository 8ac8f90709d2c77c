"""Online DPO: the pairs of each prompt, the loss by hand and beside DPO's, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from textgym.agents import OnlineDPO, OnlineDPOConfig
from textgym.agents.common.policy_gradient import Batch
from textgym.agents.common.rollout import Rollout
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())
BETA = 0.3
SCORES = torch.tensor(
    [
        [1.0, 4.0, 2.0, 0.0],  # the second before the last
        [3.0, 3.0, 3.0, 3.0],  # a tie
        [5.0, 9.0, 7.0, 8.0],  # the first and the second have no score: the fourth before the third
        [2.0, 6.0, 7.0, 8.0],  # one score alone
    ]
)
UNSCORED = [8, 9, 13, 14, 15]
PAIRS = {1: 3, 11: 10}


def make_agent(envs: dict[str, Any] | None = None, **settings: Any) -> OnlineDPO:
    arguments: dict[str, Any] = {
        "prompts": ["one", "three", "a longer prompt"],
        "tokenizer": byte_tokenizer(),
        "reward": lambda completions: [float(len(text)) for text in completions],
        "stop": list(range(0, 256, 8)),  # so that lengths differ
        "reference": mock_lm(seed=5),  # another model, so that log-ratios are not 0
        "kl_coef": BETA,
        "max_new_tokens": 6,
        **(envs or {}),
    }
    made = gym.make_vec("textgym/Text-v0", num_envs=16, **arguments)
    config = {"episodes_per_update": 16, "group_size": 4, "learning_rate": 0.0, "max_grad_norm": 1e9, **settings}
    return OnlineDPO(ActorCritic.from_pretrained(mock_lm()), made, OnlineDPOConfig(**config))


def with_scores(rollout: Rollout) -> Rollout:
    """The rollout with the scores of the table above."""
    scores = SCORES.flatten().clone()
    scores[UNSCORED] = 0.0
    raw = scores.clone()
    raw[UNSCORED] = torch.nan
    last = rollout.sequences.response_lengths - 1
    rewards = torch.zeros_like(rollout.rewards).scatter(1, last[:, None], scores[:, None])
    return replace(rollout, rewards=rewards, scores=scores, raw_scores=raw)


def update(agent: OnlineDPO) -> tuple[Rollout, list[Batch], dict[str, float]]:
    """Make one update on the scores above; return the rollout, the batches of its losses, and its metrics."""
    batches: list[Batch] = []
    loss = agent.loss

    def noted(new: Any, batch: Batch) -> Any:
        batches.append(batch)
        return loss(new, batch)

    agent.loss = noted  # type: ignore[method-assign]
    rollout = with_scores(agent.play())
    return rollout, batches, agent.update(rollout, agent.measure_kl(rollout))


def test_the_advantage_of_an_episode_is_the_sign_of_its_side() -> None:
    agent = make_agent()
    rollout, _, _ = update(agent)
    assert agent.advantages is not None
    expected = torch.zeros(len(rollout))
    expected[list(PAIRS)] = 1.0
    expected[list(PAIRS.values())] = -1.0
    assert torch.equal(agent.advantages, expected[:, None] * rollout.response_mask)


def log_ratios(agent: OnlineDPO, rollout: Rollout) -> Tensor:
    """log pi - log pi_ref of each episode."""
    reference = agent.penalty.reference.sequence_log_probs(rollout.sequences)
    return (agent.policy.sequence_log_probs(rollout.sequences) - reference).sum(1)


def gradient(agent: OnlineDPO) -> Tensor:
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None])


def test_the_best_and_the_worst_of_each_prompt_are_a_pair_and_ties_are_left_out() -> None:
    agent = make_agent()
    _, [batch], metrics = update(agent)
    assert dict(zip(batch.indices.tolist(), agent.rejected[batch.indices].tolist(), strict=True)) == PAIRS
    assert metrics["frac_reward_zero_std"] == 0.5
    assert agent.advantages is not None
    assert agent.advantages[:, 0].nonzero()[:, 0].tolist() == [1, 3, 10, 11]


def test_the_loss_is_that_of_dpo_by_hand() -> None:
    agent = make_agent()
    rollout, _, metrics = update(agent)
    ratios = log_ratios(agent, rollout)
    margins = torch.stack([BETA * (ratios[one] - ratios[other]) for one, other in PAIRS.items()])
    assert margins.abs().max() > 0.1
    assert_close(torch.tensor(metrics["loss/policy_avg"]), -logsigmoid(margins).mean(), terms=FORWARD, scale=8.0)
    assert_close(torch.tensor(metrics["rewards/margins"]), margins.mean(), terms=FORWARD, scale=8.0)
    assert metrics["rewards/accuracies"] == (margins > 0).double().mean()


def test_the_probability_of_a_label_is_the_sigmoid_of_the_difference_of_scores() -> None:
    agent = make_agent(use_probability=True)
    rollout, _, metrics = update(agent)
    ratios = log_ratios(agent, rollout)
    margins = torch.stack([BETA * (ratios[one] - ratios[other]) for one, other in PAIRS.items()])
    p = torch.tensor([4.0, 1.0]).sigmoid()
    expected = -(p * logsigmoid(margins) + (1 - p) * logsigmoid(-margins)).mean()
    assert_close(torch.tensor(metrics["loss/policy_avg"]), expected, terms=FORWARD, scale=8.0)


def test_pairs_in_parts_have_the_gradient_of_all_pairs_together() -> None:
    whole, parts = make_agent(), make_agent(micro_batch_size=1)
    update(whole)
    _, batches, _ = update(parts)
    assert [len(batch) for batch in batches] == [1, 1]
    assert gradient(whole).norm() > 0
    assert_close(gradient(parts), gradient(whole), terms=FORWARD, scale=float(gradient(whole).abs().max()))


def test_equal_scores_are_no_step() -> None:
    agent = make_agent({"reward": lambda completions: [1.0] * len(completions)}, learning_rate=0.1)
    before = [weight.clone() for weight in agent.policy.parameters()]
    history: list[dict[str, float]] = []
    agent.learn(16, [lambda _, metrics: history.append(metrics)])
    assert history[0]["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(*pair) for pair in zip(before, agent.policy.parameters(), strict=True))


def test_what_the_loss_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl_coef, which is 0"):
        make_agent({"kl_coef": 0.0})
    with pytest.raises(ConfigError, match=r"kl_clamp=1\.0 would remove the gradient"):
        make_agent({"kl_clamp": 1.0})
    with pytest.raises(ConfigError, match="use_probability=True cannot be used with loss='ipo'"):
        OnlineDPOConfig(loss="ipo", use_probability=True)
