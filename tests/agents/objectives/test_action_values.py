"""The actor-critic that learns Q and V: its advantages, targets and gradients, on a task whose Q is known exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from textgym.agents import A2C, A2CConfig
from textgym.agents.common.rollout import collect
from textgym.models.actor_critic import ActorCritic
from textgym.models.sequences import Sequences
from textgym.testing import ExactTask, assert_close, byte_tokenizer, mock_lm

TASK = ExactTask(vocab_size=5, horizon=2, seed=1)
BETA = 0.3
ROWS = 32


def make_agent(**settings: Any) -> Any:
    envs = gym.make_vec("textgym/Text-v0", num_envs=ROWS, kl_mode="deferred", **TASK.env_kwargs(BETA))
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    with torch.no_grad():  # away from the reference, so that the KL is not 0
        weight = policy.lm.model.logits.weight
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return A2C(policy, envs, A2CConfig(episodes_per_update=ROWS, estimator="q", **settings))


def token_log_probs(model: Any) -> dict[tuple[int, ...], float]:
    """The log-prob of the last token of every beginning of a text, by one pass over all texts."""
    sequences = TASK.sequences(TASK.texts)
    with torch.no_grad():
        log_probs = sequences.pad(
            model.logits(sequences.states()).log_softmax(-1).gather(1, sequences.actions[:, None])[:, 0]
        )
    return {
        text[: step + 1]: float(log_probs[row, step])
        for row, text in enumerate(TASK.texts)
        for step in range(len(text))
    }


def exact_q(agent: Any) -> dict[tuple[int, ...], float]:
    """Q of the last token of every beginning: the mean of rewards minus KL over the texts that go on from it."""
    new, old = token_log_probs(agent.policy), token_log_probs(agent.penalty.reference)
    values = {}
    for begin in new:
        total = 0.0
        for text, reward in zip(TASK.texts, TASK.rewards, strict=True):
            if text[: len(begin)] == begin:
                later = [text[: step + 1] for step in range(len(begin) - 1, len(text))]
                chance = np.exp(sum(new[each] for each in later[1:]))
                total += chance * (reward - BETA * sum(new[each] - old[each] for each in later))
        values[begin] = total
    return values


def plant(agent: Any, q: dict[tuple[int, ...], float]) -> None:
    """Make the critic exact: its table has Q of every token, and W is the identity."""
    table, base = agent.policy.critic.logits.weight, TASK.vocab_size + 1
    with torch.no_grad():
        agent.action_values.weight.copy_(torch.eye(TASK.vocab_size))
        for begin, value in q.items():
            context = (0, *begin[:-1])
            table[sum((token + 1) * base**place for place, token in enumerate(context)), begin[-1]] = value


def of_tokens(sequences: Sequences, values: dict[tuple[int, ...], float]) -> Tensor:
    """Values of the beginnings of texts, as `(N, T)`."""
    found = torch.zeros(sequences.response_mask.shape)
    for row, length in enumerate(sequences.response_lengths.tolist()):
        text = tuple(sequences.input_ids[row, 1 : 1 + length].tolist())
        for step in range(length):
            found[row, step] = values[text[: step + 1]]
    return found


def test_advantages_are_exact_if_q_is() -> None:
    """And so are the targets of Q, because the next state is certain: r + V(s') = Q(s, a)."""
    agent = make_agent(normalise_values=False)
    q, new = exact_q(agent), token_log_probs(agent.policy)
    v = {
        begin: sum(
            np.exp(new[other]) * q[other] for other in q if other[:-1] == begin[:-1] and len(other) == len(begin)
        )
        for begin in q
    }
    plant(agent, q)
    rollout = collect(agent.envs, agent.policy)
    agent.update(rollout, agent.measure_kl(rollout))
    expected_q, expected_v = of_tokens(rollout.sequences, q), of_tokens(rollout.sequences, v)
    assert_close(agent.advantages, expected_q - expected_v, terms=100)
    assert_close(agent.returns, expected_q, terms=100)
    assert expected_v.std() > 0.1


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_v_is_the_mean_of_q_over_the_policy(critic: str) -> None:
    """Token by token, with banned stop tokens and a temperature; Q is V before the first update."""
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["ab", "c"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions, **_: [0.0] * len(completions),
        max_new_tokens=3,
        min_new_tokens=2,
    )
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1), critic=critic, temperature=0.7)
    agent = A2C(policy, envs, A2CConfig(episodes_per_update=4, estimator="q"))
    sequences = collect(envs, policy).sequences
    assert agent.action_values is not None
    q, v = agent.action_values.of_sequences(policy, sequences)
    assert_close(q.detach(), v, terms=258)
    with torch.no_grad():
        agent.action_values.weight.normal_(generator=torch.Generator().manual_seed(0))
        q, v = agent.action_values.of_sequences(policy, sequences)
        states = sequences.states()
        log_probs = policy.distribution_of(sequences).log_probs(policy.logits(states) * policy.temperature)
        advantages = policy.critic_hidden(states) @ agent.action_values.weight.T @ policy.head.weight.T  # (M, V)
        all_q = policy.state_values(states)[:, None] + advantages
    assert_close(v, sequences.pad((log_probs.exp() * all_q).sum(1)), terms=1000)
    assert_close(q, sequences.pad(all_q.gather(1, sequences.actions[:, None])[:, 0]), terms=1000)
    assert (q - v).abs().max() > 0.1


def test_a_fit_of_the_scale_changes_no_difference_of_q() -> None:
    """Q(s, a) - v(s) is what it was, in whatever unit; Q itself too, once v has learned something."""
    agent = make_agent()
    with torch.no_grad():
        agent.action_values.weight.normal_(generator=torch.Generator().manual_seed(0))
        agent.policy.value_head.bias.fill_(0.25)
    rollout = collect(agent.envs, agent.policy)
    q, v = (values.detach() for values in agent.action_values.of_sequences(agent.policy, rollout.sequences))
    agent.fit_scale(rollout, torch.where(rollout.response_mask, 100.0 + 50.0 * torch.randn(q.shape), 0.0))
    assert agent.policy.value_head.std > 10
    after = agent.action_values.of_sequences(agent.policy, rollout.sequences)
    for value, expected in zip(after, (q, v), strict=True):
        assert_close(value.detach(), expected, terms=100, scale=100.0)


def test_a_refused_step_leaves_the_scale_of_q_as_it_was() -> None:
    agent = make_agent(on_nonfinite="skip")
    agent.learn(2 * ROWS)
    q, head = agent.action_values.weight.clone(), agent.policy.value_head.state_dict()
    head = {name: tensor.clone() for name, tensor in head.items()}
    loss = agent.loss
    agent.loss = lambda new, batch: (loss(new, batch)[0] * torch.nan, loss(new, batch)[1])
    agent.learn(3 * ROWS)
    assert agent.finite_steps.skipped == 1
    assert q.abs().max() > 0
    assert torch.equal(agent.action_values.weight, q)
    for name, tensor in agent.policy.value_head.state_dict().items():
        assert torch.equal(tensor, head[name]), name


def test_the_loss_of_q_does_not_move_the_policy() -> None:
    agent = make_agent()
    with torch.no_grad():
        agent.action_values.weight.fill_(0.1)
    rollout = collect(agent.envs, agent.policy)
    q, _ = agent.action_values.of_sequences(agent.policy, rollout.sequences)
    q.square().sum().backward()
    assert all(weight.grad is None for weight in agent.policy.lm.parameters())
    assert agent.policy.critic.logits.weight.grad.abs().max() > 0
    assert agent.action_values.weight.grad.abs().max() > 0


def test_a_saved_agent_goes_on_with_its_q(tmp_path: Path) -> None:
    agent = make_agent()
    agent.learn(2 * ROWS)
    assert agent.action_values.weight.abs().max() > 0
    agent.save(tmp_path / "agent")
    envs = gym.make_vec("textgym/Text-v0", num_envs=ROWS, kl_mode="deferred", **TASK.env_kwargs(BETA))
    loaded: Any = A2C.load(tmp_path / "agent", envs)
    assert torch.equal(loaded.action_values.weight, agent.action_values.weight)
    assert len(loaded.optimizer.state) == len(agent.optimizer.state)
