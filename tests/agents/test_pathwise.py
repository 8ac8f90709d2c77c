"""The pathwise derivative: its relaxation, what its actor earns, its targets."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import Pathwise, PathwiseConfig
from textgym.agents.common.replay_buffer import ReplayBatch
from textgym.agents.pathwise import relax
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.models.sequences import Sequences
from textgym.testing import ExactTask, Measured, assert_learns

TASK = ExactTask(vocab_size=5, horizon=3, seed=2)


def texts(*chosen: int) -> Sequences:
    return TASK.sequences([TASK.texts[index] for index in chosen])


def make_envs(beta: float = 0.0, **changes: Any) -> Any:
    return gym.make_vec("textgym/Text-v0", num_envs=32, kl_mode="deferred", **TASK.env_kwargs(beta) | changes)


def make_agent(envs: Any = None, **changes: Any) -> Pathwise:
    config = {"episodes_per_update": 32, "learning_starts": 32, "learning_rate": 0.05, "adam_epsilon": 1e-8, **changes}
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    return Pathwise(policy, make_envs() if envs is None else envs, PathwiseConfig(**config))


def batch_of(agent: Pathwise, *chosen: int) -> ReplayBatch:
    sequences = texts(*chosen)
    rewards = torch.where(sequences.response_mask, torch.arange(1.0, 1 + TASK.horizon), 0.0)
    reference = agent.penalty.reference.sequence_log_probs(sequences)
    ones = torch.ones(len(chosen))
    return ReplayBatch(sequences, rewards, reference, ones, torch.arange(len(chosen)))


def test_relaxed_tokens_are_drawn_from_the_policy() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.2]).log().expand(30_000, 3)
    token = relax(log_probs, 0, PathwiseConfig())
    # 4.3 standard errors of the share that has the largest one, 0.0029: other draws would fail once in 20,000 times.
    torch.testing.assert_close(token.mean(0), torch.tensor([0.5, 0.3, 0.2]), atol=0.0125, rtol=0)
    assert ((token == 0) | ((token - 1).abs() < 1e-6)).all()
    soft = relax(log_probs, 0, PathwiseConfig(relaxation="gumbel"))
    assert torch.equal(soft.argmax(1), token.argmax(1))
    torch.testing.assert_close(soft.sum(1), torch.ones(30_000))
    sharp = relax(log_probs, 0, PathwiseConfig(relaxation="gumbel", relaxation_temperature=0.01))
    assert sharp.amax(1).mean() > 0.98


def reference_hidden(agent: Pathwise, sequences: Sequences) -> torch.Tensor:
    return agent.penalty.reference.hidden(sequences.states())


def test_the_actor_is_pushed_to_where_the_critic_says_more_and_the_critic_is_not_moved_by_it() -> None:
    agent = make_agent()
    sequences = texts(0, 40, 60, 80)
    hidden = reference_hidden(agent, sequences)
    weight = agent.policy.lm.model.logits.weight
    for seed in range(64):  # the noise of the relaxation; gradients add up
        earned, _, _ = agent.values(agent.policy, agent.q, sequences, hidden, seed=seed)
        earned.sum().backward()
    assert all(weight.grad is None for weight in agent.q.actor.parameters())
    mean = weight.grad.flatten() / 64
    exact, _, _ = agent.values(agent.policy, agent.q, sequences, hidden)
    (gradient,) = torch.autograd.grad(exact.sum(), weight)
    assert torch.nn.functional.cosine_similarity(mean, gradient.flatten(), 0) > 0.9  # 0.975, with a deviation of 0.003


@pytest.mark.parametrize("min_new_tokens", [0, 2])
def test_what_the_actor_earns_is_the_mean_of_q_over_its_tokens(min_new_tokens: int) -> None:
    """Against Q token by token, also where stop tokens are banned, and its KL against the sum over the vocabulary."""
    agent = make_agent(make_envs(0.3))
    with torch.no_grad():
        for model, seed in ((agent.policy, 1), (agent.q.actor, 2)):
            noise = torch.randn(model.lm.model.logits.weight.shape, generator=torch.Generator().manual_seed(seed))
            model.lm.model.logits.weight += noise
    plain = texts(30, 60, 80)
    stop = StopRule(TASK.stop.ids, min_new_tokens)
    sequences = Sequences(plain.input_ids, plain.prompt_lengths, plain.response_lengths, stop)
    earned, kl, offset = agent.values(agent.policy, agent.q, sequences, reference_hidden(agent, sequences))
    count = len(sequences.actions)
    expected, divergence = torch.zeros(count), torch.zeros(count)
    for token in range(TASK.vocab_size):
        actions = torch.full((count,), token)
        states = sequences.states()
        bans = torch.zeros(count, TASK.vocab_size, dtype=torch.bool)
        if sequences.banned is not None:
            bans[:, list(stop.ids)] = sequences.banned[:, None]
        own, reference = (model.state_log_probs(states, actions.where(~bans[:, token], 0), ~bans)
                          for model in (agent.policy, agent.penalty.reference))  # fmt: skip
        q = agent.q.of_actions(sequences, actions)
        expected += torch.where(bans[:, token], 0.0, own.exp() * q)
        divergence += torch.where(bans[:, token], 0.0, own.exp() * (own - reference))
    torch.testing.assert_close(earned + offset, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kl, divergence, atol=1e-5, rtol=1e-5)


def test_pathwise_targets_have_the_kl_of_later_states_alone() -> None:
    agent = make_agent(make_envs(0.3), gamma=0.9)
    with torch.no_grad():
        noise = torch.randn(agent.target.lm.model.logits.weight.shape, generator=torch.Generator().manual_seed(1))
        agent.target.lm.model.logits.weight += noise
    batch = batch_of(agent, 60, 80)
    sequences = batch.sequences
    earned, kl, offset = agent.values(agent.target, agent.target_q, sequences, reference_hidden(agent, sequences))
    value = sequences.pad(earned + offset - 0.3 * kl)
    targets = batch.rewards + 0.9 * torch.cat([value[:, 1:], torch.zeros(2, 1)], 1)
    _, errors, _ = agent.loss(batch)
    torch.testing.assert_close(errors, targets - sequences.pad(agent.q.of_actions(sequences)).detach())


def test_the_actors_loss_falls_where_q_minus_the_kl_penalty_rises() -> None:
    agent = make_agent(make_envs(0.3))
    with torch.no_grad():
        for model, seed in ((agent.policy, 1), (agent.q.actor, 2)):
            noise = torch.randn(model.lm.model.logits.weight.shape, generator=torch.Generator().manual_seed(seed))
            model.lm.model.logits.weight += noise
    batch = batch_of(agent, 0, 40, 60, 80)
    weight = agent.policy.lm.model.logits.weight
    for _ in range(64):  # the noise of the relaxation; gradients add up
        agent.loss(batch)[0].backward()
    earned, kl, _ = agent.values(agent.policy, agent.q, batch.sequences, reference_hidden(agent, batch.sequences))
    (exact,) = torch.autograd.grad((0.3 * kl - earned).mean(), weight)
    assert torch.nn.functional.cosine_similarity(weight.grad.flatten(), exact.flatten(), 0) > 0.8


def test_the_critic_has_no_weights_that_nothing_trains() -> None:
    """Noise and quantiles are Q-learning's."""
    agent = make_agent()
    assert not list(agent.q.heads.parameters())


SMALL = ExactTask(vocab_size=5, horizon=2, seed=2)


def kl_left(seed: int, **changes: Any) -> float:
    """Without rewards the actor goes back to the reference: the share of its KL that is left after training."""
    arguments = SMALL.env_kwargs(1.0) | {"reward": lambda completions: [0.0] * len(completions)}
    envs = gym.make_vec("textgym/Text-v0", num_envs=64, kl_mode="deferred", **arguments)
    policy = ActorCritic.from_pretrained(SMALL.language_model(), critic="separate")
    with torch.no_grad():
        noise = torch.randn(policy.lm.model.logits.weight.shape, generator=torch.Generator().manual_seed(1))
        policy.lm.model.logits.weight += noise
    settings = {"episodes_per_update": 64, "learning_starts": 64, "learning_rate": 0.2, "adam_epsilon": 1e-8}
    agent = Pathwise(policy, envs, PathwiseConfig(**{**settings, "q_scale": 1e-3, "seed": seed, **changes}))

    def divergence() -> float:
        log_probs = SMALL.log_probs(policy)
        return float((np.exp(log_probs) * (log_probs - SMALL.log_reference)).sum())

    before = divergence()
    agent.learn(64 * 8)
    return divergence() / before


@pytest.mark.slow
def test_pathwise_learns_to_pay_less_kl() -> None:
    """A false failure has a chance below 1e-9."""
    gains = [1 - kl_left(seed) for seed in range(2)]
    assert_learns(gains, at_least=0.7, measured=Measured(mean=0.991, standard_deviation=0.001, runs=6))


@pytest.mark.slow
def test_pathwise_without_a_learning_rate_pays_the_same_kl() -> None:
    assert kl_left(0, learning_rate=0.0) == 1.0


def test_no_gradient_flows_through_the_critics_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the target networks could be trained."""
    agent = make_agent(make_envs(0.3))
    for network in (agent.target, agent.target_q.actor, agent.target_q.heads, agent.penalty.reference):
        network.requires_grad_(True)
    agent.loss(batch_of(agent, 60, 80))[0].backward()
    for network in (agent.target, agent.target_q.actor, agent.target_q.heads, agent.penalty.reference):
        assert all(weight.grad is None for weight in network.parameters())
    assert any(weight.grad is not None for weight in agent.q.actor.parameters())
    assert any(weight.grad is not None for weight in agent.policy.parameters())
