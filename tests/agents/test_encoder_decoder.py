"""Agents train encoder-decoder policies with the code they train causal ones with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
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
from textgym.agents.rollout import collect
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import ESTIMATORS, KLPenalty
from textgym.testing import (
    assert_close,
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


def test_ppo_improves_a_task() -> None:
    config = PPOConfig(episodes_per_update=64, learning_rate=1e-2, seed=0)
    scores: list[float] = []
    agent = PPO(make_policy(), make_envs(16), config)
    agent.learn(64 * 12, [lambda agent, metrics: scores.append(metrics["objective/scores"])])
    assert scores[0] < 0.3
    assert scores[-1] > scores[0] + 0.3


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
    wanted = {"episodes_per_update": 16, "memory_size": 32, "learning_starts": 16, "group_size": 4, "batch_size": 8}
    policy = make_policy()
    before = policy.lm.shared.weight.clone()
    agent(policy, make_envs(), config(**{k: v for k, v in wanted.items() if k in names})).learn(48)
    assert not torch.equal(policy.lm.shared.weight, before)


def test_dpo_learns_preferences_after_the_start_tokens() -> None:
    pairs = [{"prompt": f"{i}", "chosen": "ab" * (1 + i % 3), "rejected": "cd"} for i in range(8)]
    config = DPOConfig(batch_size=4, micro_batch_size=2, epochs=6, learning_rate=1e-2)
    agent = DPO(ActorCritic.from_pretrained(mock_seq2seq_lm(num_layers=1)), pairs, byte_tokenizer(), config)
    history: list[dict[str, float]] = []
    agent.learn([lambda _, metrics: history.append(metrics)])
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=ROUNDING), "trap 2: it starts at its reference"
    assert history[-1]["rewards/accuracies"] == 1.0
    assert history[-1]["rewards/margins"] > 0.5


def test_sft_learns_completions_after_the_start_tokens() -> None:
    rows = [{"prompt": f"{i}", "completion": "ab" if i % 2 else "cd"} for i in range(8)]
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm(num_layers=1))
    agent = SFT(policy, rows, byte_tokenizer(), SFTConfig(batch_size=8, epochs=12, learning_rate=1e-2))
    sequences = agent.sequences(range(8))
    assert sequences.decoder_start == policy.decoder_start_ids
    before = policy.sequence_log_probs(sequences).sum()
    agent.learn()
    assert policy.sequence_log_probs(sequences).sum() > 0.5 * before
