"""Agents train encoder-decoder policies with the code they train causal ones with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import (
    A2C,
    DPO,
    DQN,
    GRPO,
    PPO,
    SFT,
    A2CConfig,
    DPOConfig,
    DQNConfig,
    GRPOConfig,
    PPOConfig,
    SFTConfig,
)
from textgym.agents.common.rollout import collect
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import ESTIMATORS, KLPenalty
from textgym.testing import (
    Measured,
    assert_close,
    assert_learns,
    byte_tokenizer,
    letter_tokenizer,
    mock_seq2seq_lm,
    terms_of,
    tolerance,
)

FORWARD = terms_of(mock_seq2seq_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

V = 12


def share_of_a(completion_ids: list[list[int]]) -> list[float]:
    return [ids.count(0) / 4 for ids in completion_ids]


def make_envs(num_envs: int = 8, **settings: Any) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=num_envs,
        **{
            "prompts": ["ab", "cde", "f"],
            "tokenizer": letter_tokenizer(V),
            "reward": share_of_a,
            "kl_coef": 0.01,
            "kl_mode": "deferred",
            "max_prompt_tokens": 3,
            "max_new_tokens": 4,
            "decoder_start_ids": [V - 1],
            **settings,
        },
    )


def make_policy(architecture: str = "t5", critic: str = "shared") -> ActorCritic:
    return ActorCritic.from_pretrained(mock_seq2seq_lm(V, num_layers=1, architecture=architecture), critic)


@pytest.mark.parametrize(("architecture", "critic"), [("t5", "shared"), ("bart", "separate")])
def test_a_rollout_has_the_log_probs_and_values_of_whole_sequences(architecture: str, critic: str) -> None:
    policy, envs = make_policy(architecture, critic), make_envs(autoreset_mode="Disabled", array="torch")
    torch.nn.init.normal_(policy.value_head.weight)
    policy.seed(0)
    envs.reset(seed=0)
    rollout = collect(envs, policy)
    assert rollout.sequences.decoder_start == (V - 1,)
    evaluation = policy.evaluate(rollout.sequences)
    assert_close(evaluation.log_prob, rollout.log_probs, terms=FORWARD)
    assert_close(evaluation.value, rollout.values, terms=FORWARD)
    for estimator in ESTIMATORS:
        penalty = KLPenalty(policy.reference(), 0.1, estimator)
        assert penalty.of_sequences(policy, rollout.sequences, rollout.log_probs).abs().max() < ROUNDING


def gain_of(seed: int, learning_rate: float = 1e-2) -> float:
    """The mean score of the last two updates less that of the first two, 128 episodes each; a score is from 0 to 1."""
    config = PPOConfig(episodes_per_update=64, num_epochs=2, learning_rate=learning_rate, seed=seed)
    scores: list[float] = []
    agent = PPO(make_policy(), make_envs(64), config)
    agent.learn(64 * 8, [lambda agent, metrics: scores.append(metrics["objective/scores"])])
    return float(np.mean(scores[-2:]) - np.mean(scores[:2]))


@pytest.mark.slow
def test_ppo_improves_a_task() -> None:
    """A false failure has a chance of 3e-5."""
    gains = [gain_of(seed) for seed in range(2)]
    assert_learns(gains, at_least=0.15, measured=Measured(mean=0.654, standard_deviation=0.105, runs=12))


@pytest.mark.slow
def test_ppo_without_a_learning_rate_fails() -> None:
    """A score has a deviation of 0.15 at first, so a gain of nothing has one of 0.02."""
    assert max(gain_of(seed, learning_rate=0.0) for seed in range(5)) < 0.1


@pytest.mark.bit_for_bit
def test_a_saved_agent_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = PPOConfig(episodes_per_update=16, learning_rate=1e-2)
    whole = PPO(make_policy(), make_envs(), config).learn(48)
    first = PPO(make_policy(), make_envs(), config)
    first.learn(48, [lambda agent, metrics: agent.episodes < 32])
    first.save(tmp_path / "run")
    second = PPO.load(tmp_path / "run", make_envs()).learn(48)
    for (name, one), other in zip(whole.policy.named_parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize(("agent", "config"), [(A2C, A2CConfig), (GRPO, GRPOConfig), (DQN, DQNConfig)])
def test_other_agents_run(agent: Any, config: Any) -> None:
    names = {field.name for field in dataclasses.fields(config)}
    wanted = {"episodes_per_update": 16, "buffer_size": 32, "learning_starts": 16, "group_size": 4, "batch_size": 8}
    policy = make_policy()
    before = policy.lm.shared.weight.clone()
    agent(policy, make_envs(), config(**{k: v for k, v in wanted.items() if k in names})).learn(48)
    assert not torch.equal(policy.lm.shared.weight, before)


@pytest.mark.slow
def test_dpo_learns_preferences_after_the_start_tokens() -> None:
    """Margins of the last epoch, which has each pair once: 0 for a policy that does not move."""
    margins = []
    for seed in range(2):
        pairs = [{"prompt": f"{i}", "chosen": "ab" * (1 + i % 3), "rejected": "cd"} for i in range(8)]
        config = DPOConfig(batch_size=4, micro_batch_size=2, epochs=6, learning_rate=1e-2, seed=seed)
        agent = DPO(ActorCritic.from_pretrained(mock_seq2seq_lm(num_layers=1)), pairs, byte_tokenizer(), config)
        history: list[dict[str, float]] = []
        agent.learn([lambda _, metrics, history=history: history.append(metrics)])
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=ROUNDING), "it starts at its reference"
        margins.append(float(np.mean([row["rewards/margins"] for row in history[-2:]])))
    assert_learns(margins, at_least=1.0, measured=Measured(mean=3.21, standard_deviation=0.05, runs=6))


def test_sft_learns_completions_after_the_start_tokens() -> None:
    """All rows are one batch, so a seed changes the order of its sums and no more.

    The log-prob of the completions rises from -146 to -39; if nothing is learned it stays as it is.
    """
    rows = [{"prompt": f"{i}", "completion": "ab" if i % 2 else "cd"} for i in range(8)]
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm(num_layers=1))
    agent = SFT(policy, rows, byte_tokenizer(), SFTConfig(batch_size=8, epochs=12, learning_rate=1e-2))
    sequences = agent.sequences(range(8))
    assert sequences.decoder_start == policy.decoder_start_ids
    before = policy.sequence_log_probs(sequences).sum()
    agent.learn()
    assert policy.sequence_log_probs(sequences).sum() > 0.5 * before
