"""Policy, tokenizer and reference are compared when they meet the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.agents import PPO, PPOConfig
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.masks import TopKMask
from textgym.testing import byte_tokenizer, mock_lm, mock_seq2seq_lm

EOS = 256


def make(**settings: Any) -> TextVectorEnv:
    """An environment of four rows whose agent pays the KL."""
    given: dict[str, Any] = {
        "prompts": ["abc", "defgh"],
        "tokenizer": byte_tokenizer(),
        "reward": lambda completions: [float(len(text)) for text in completions],
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
        "kl_mode": "deferred",
        "kl_coef": 0.1,
        **settings,
    }
    return TextVectorEnv(4, **given)


def train(policy: ActorCritic, envs: Any, learning_rate: float = 1e-2) -> dict[str, float]:
    """Metrics of the last of two updates."""
    metrics: list[dict[str, float]] = []
    PPO(policy, envs, PPOConfig(episodes_per_update=8, learning_rate=learning_rate)).learn(
        16, [lambda agent, figures: metrics.append(figures) or True]
    )
    return metrics[-1]


def random_policy(vocab_size: int = 258, **settings: Any) -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm(vocab_size, num_layers=1, **{"eos_token_id": EOS, **settings}))


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_policy_whose_vocabulary_is_padded_plays_and_learns(with_reference: bool) -> None:
    policy = random_policy(300)
    reference = mock_lm(300, num_layers=1, eos_token_id=EOS) if with_reference else None
    envs = make(reference=reference)
    metrics = train(policy, envs)
    assert envs.single_action_space.n == 300
    assert metrics["objective/kl"] == metrics["objective/kl"]


def test_the_size_is_that_of_the_model_that_the_tokenizer_was_saved_with(tmp_path: Path) -> None:
    random_policy(300).save_pretrained(tmp_path, byte_tokenizer())
    assert make(tokenizer=tmp_path).single_action_space.n == 300


def test_a_policy_with_fewer_tokens_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the policy .* has 250 tokens, and the tokenizer .* has 258"):
        train(random_policy(250, eos_token_id=249), make())
    with pytest.raises(ValueError, match=r"the reference .* has 250 tokens, and the tokenizer .* has 258"):
        make(reference=mock_lm(250, num_layers=1, eos_token_id=249))


def test_a_policy_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    random_policy(2048, eos_token_id=0).save_pretrained(tmp_path, byte_tokenizer())
    with pytest.raises(ValueError, match="was saved with another tokenizer"):
        train(ActorCritic.from_pretrained(tmp_path), make(tokenizer="tiny"))


def test_policy_and_reference_of_different_sizes_are_refused() -> None:
    envs = make(reference=mock_lm(280, num_layers=1, eos_token_id=EOS))
    with pytest.raises(ValueError, match=r"the policy .* has 300 tokens, and the reference .* has 280"):
        train(random_policy(300), envs)


def test_rows_end_at_all_stop_tokens_of_the_policys_generation_config() -> None:
    policy = random_policy()
    policy.lm.generation_config.eos_token_id = [EOS, *range(100, 180)]
    envs = make()
    PPO(policy, envs, PPOConfig(episodes_per_update=8))
    assert envs.single_action_space.stop.ids == (*range(100, 180), EOS)
    envs.reset(seed=0)
    *_, terminated, _, infos = envs.step(torch.tensor([120, 5, EOS, 6]))
    assert terminated.tolist() == [True, False, True, False]
    assert infos["ended_by_stop"][[0, 2]].all()


def test_a_stop_token_outside_the_policys_vocabulary_is_refused() -> None:
    policy = random_policy()
    policy.lm.generation_config.eos_token_id = [EOS, 50_256]
    with pytest.raises(ValueError, match=r"stop tokens \[50256\] are outside the vocabulary of the policy"):
        train(policy, make())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_prompts_and_responses_beyond_the_policys_positions_are_refused(architecture: str) -> None:
    policy = random_policy(architecture=architecture, max_position_embeddings=10)
    with pytest.raises(ValueError, match=r"a prompt with its response for the policy has up to 11 tokens.* for 10"):
        train(policy, make())
    train(policy, make(max_new_tokens=5))
    short = mock_lm(num_layers=1, max_position_embeddings=10)
    with pytest.raises(ValueError, match="a prompt with its response for the reference has up to 11 tokens"):
        make(reference=short)


def test_prompts_beyond_an_encoders_positions_are_refused() -> None:
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm(num_layers=1, architecture="bart", max_position_embeddings=6))
    envs = make(decoder_start_ids=policy.decoder_start_ids)
    with pytest.raises(ValueError, match="a response for the policy has up to 7 tokens"):
        train(policy, envs)


@pytest.mark.parametrize("given", ["module", "policy"])
@pytest.mark.parametrize("policy_first", [False, True])
def test_a_reference_that_is_the_policys_own_module_stays_as_it_is_and_the_policy_learns(
    given: str, policy_first: bool
) -> None:
    lm = mock_lm(num_layers=1)
    start = {name: weight.clone() for name, weight in lm.state_dict().items()}
    if given == "policy" or policy_first:
        policy = ActorCritic.from_pretrained(lm)
        envs = make(reference=lm if given == "module" else policy)
    else:
        envs = make(reference=lm)
        policy = ActorCritic.from_pretrained(lm)
    assert all(weight.requires_grad for weight in policy.lm.parameters())
    metrics = train(policy, envs)
    assert any(not torch.equal(weight, start[name]) for name, weight in policy.lm.state_dict().items())
    reference = envs.task.penalty.reference
    assert all(torch.equal(weight, start[name]) for name, weight in reference.lm.state_dict().items())
    assert abs(metrics["objective/kl"]) > 1e-3


def test_a_frozen_module_is_the_reference_without_a_copy() -> None:
    lm = mock_lm(num_layers=1).requires_grad_(False)
    assert make(reference=lm).task.penalty.reference.lm is lm


def test_an_exact_kl_is_not_to_the_policy_itself() -> None:
    policy = random_policy()
    env = TextEnv(
        ["abc"], byte_tokenizer(), lambda completions: [0.0], reference=policy.lm, kl_mode="exact", kl_coef=1.0
    )
    env.attach_policy(policy)
    with torch.no_grad():
        for weight in policy.lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    env.reset(seed=0)
    assert any(abs(env.step(token)[1]) > 1e-3 for token in (97, 98, 99))


def test_an_attached_policy_of_another_tokenizer_is_refused() -> None:
    env = TextEnv(["abc"], byte_tokenizer(), lambda completions: [0.0])
    with pytest.raises(ValueError, match="has 100 tokens, and the tokenizer"):
        env.attach_policy(random_policy(100, eos_token_id=99))


def test_spaces_follow_a_policy_that_is_fitted_by_hand() -> None:
    policy = random_policy(300)
    env = gym.make("textgym/Text-v0", prompts=["abc"], tokenizer=byte_tokenizer(), reward=lambda completions: [0.0])
    assert env.action_space.n == 258
    env.unwrapped.fit(policy)
    assert env.action_space.n == 300
    env.reset(seed=0)
    env.step(299)


def test_a_critic_of_another_tokenizer_or_with_fewer_positions_is_refused(tmp_path: Path) -> None:
    for vocab_size, positions, message in (
        (200, 64, r"the critic .* has 200 tokens, and the tokenizer .* has 258"),
        (258, 8, "a prompt with its response for the critic has up to 11 tokens"),
    ):
        folder = tmp_path / str(vocab_size)
        mock_lm(vocab_size, num_layers=1, max_position_embeddings=positions).save_pretrained(folder)
        lm = mock_lm(num_layers=1)
        with pytest.raises(ValueError, match=message):
            train(ActorCritic.from_pretrained(lm, critic=str(folder)), make())


def test_a_mask_of_another_tokenizer_is_refused() -> None:
    mask = TopKMask(mock_lm(200, num_layers=1, eos_token_id=199), k=3)
    with pytest.raises(ValueError, match=r"the action mask's model .* has 200 tokens"):
        make(action_mask=mask)
