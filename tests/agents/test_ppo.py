"""PPO end to end on a mock model."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from textgym.agents import PPO, SFT, PPOConfig
from textgym.agents.common.rollout import collect
from textgym.errors import CutPromptsWarning
from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.rewards.models import RewardModel
from textgym.testing import (
    ExactTask,
    Measured,
    assert_learns,
    assert_trained_alike,
    byte_tokenizer,
    mock_lm,
    terms_of,
    tolerance,
)

ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def make_envs(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": ["one", "three", "a longer prompt"],
        "tokenizer": byte_tokenizer(),
        "reward": vowels,
        "reference": mock_lm(),
        "kl_coef": 0.02,
        "kl_mode": "deferred",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=16, **{**settings, **changes})


def make_agent(critic: str = "shared", envs: Any = None, **config: Any) -> PPO:
    policy = ActorCritic.from_pretrained(mock_lm(), critic=critic)
    settings = {"episodes_per_update": 32, "minibatch_size": 8, "learning_rate": 3e-3, **config}
    return PPO(policy, envs if envs is not None else make_envs(), PPOConfig(**settings))


TASK = ExactTask(vocab_size=5, horizon=2, model="transformer", seed=1)


def gain_of(critic: str, seed: int, learning_rate: float = 3e-3, **changes: Any) -> float:
    """The share of the way to the optimum, by enumeration: 0 for a policy that does not move."""
    envs = gym.make_vec("textgym/Text-v0", num_envs=128, kl_mode="deferred", **TASK.env_kwargs(0.3))
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic=critic)
    settings = {"episodes_per_update": 128, "minibatch_size": 64, "num_epochs": 2, "seed": seed, **changes}
    PPO(policy, envs, PPOConfig(learning_rate=learning_rate, **settings)).learn(128 * 10)
    return TASK.optimum(0.3).gap_closed(TASK.log_probs(policy))


@pytest.mark.parametrize("critic", ["shared", pytest.param("separate", marks=pytest.mark.slow)])
def test_learns(critic: str) -> None:
    """A transformer; test_optimality.py has tables and the other agents. A false failure has a chance of 1e-7."""
    gains = [gain_of(critic, seed) for seed in range(2)]
    assert_learns(gains, at_least=0.5, measured=Measured(mean=0.858, standard_deviation=0.008, runs=6))


@pytest.mark.slow
def test_a_transformer_without_a_learning_rate_gains_nothing() -> None:
    assert gain_of("shared", 0, learning_rate=0.0) == pytest.approx(0.0, abs=ROUNDING)


@pytest.mark.parametrize("minibatch_size", [4, 8, 32])
def test_first_update_starts_at_ratio_one(minibatch_size: int) -> None:
    """With learning rate 0 the ratio is 1 in every minibatch of every epoch."""
    history: list[dict[str, float]] = []
    agent = make_agent(learning_rate=0.0, minibatch_size=minibatch_size, num_epochs=2)
    agent.learn(64, [lambda agent, metrics: history.append(metrics)])
    for metrics in history:
        assert metrics["val/ratio"] == pytest.approx(1.0, abs=ROUNDING)
        assert metrics["policy/approxkl_avg"] < 1e-8
        assert metrics["policy/clipfrac_avg"] == 0


def test_kl_is_the_mean_over_sequences_of_the_sum_over_tokens() -> None:
    agent = make_agent(envs=make_envs(reference=mock_lm(seed=5)), learning_rate=0.0, episodes_per_update=16)
    seen: list[dict[str, float]] = []
    agent.learn(16, [lambda agent, metrics: seen.append(metrics)])
    again = make_agent(envs=make_envs(reference=mock_lm(seed=5)), learning_rate=0.0, episodes_per_update=16)
    rollout = collect(again.envs, again.policy)
    total = 0.0
    for row in range(16):
        ids = rollout.sequences.input_ids[row : row + 1, : rollout.sequences.lengths[row]]
        first = int(rollout.sequences.prompt_lengths[row])
        p, q = (lm(ids).logits.log_softmax(-1)[0, :-1] for lm in (mock_lm(), mock_lm(seed=5)))
        total += float((p - q).detach().gather(1, ids[0, 1:, None])[first - 1 :].sum())
    assert seen[0]["objective/kl"] == pytest.approx(total / 16, abs=ROUNDING)


def test_gradient_clipping_acts() -> None:
    """A reward of a million: the gradient explodes, the step taken is still one of norm max_grad_norm."""
    agent = make_agent(value_coef=1.0, clip_range_value=None, max_grad_norm=0.5)
    seen = {}

    def look(*_: Any) -> None:
        seen["norm"] = torch.stack([p.grad.norm() for p in agent.policy.parameters() if p.grad is not None]).norm()

    agent.optimizer.register_step_pre_hook(look)
    loss = 1e6 * agent.policy.evaluate(collect(agent.envs, agent.policy).sequences).log_prob.sum()
    loss.backward()
    assert agent.apply_gradients(torch.zeros(())) > 1e5
    assert seen["norm"] == pytest.approx(0.5, rel=1e-3)


def test_frozen_models_do_not_move() -> None:
    classifier = LlamaForSequenceClassification(LlamaConfig(**{**mock_lm().config.to_dict(), "num_labels": 1}))
    reward = RewardModel(classifier, byte_tokenizer())
    envs = make_envs(reward=reward)
    reference = envs.unwrapped.task.penalty.reference

    def fingerprints() -> list[str]:
        return [
            hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
            for model in (reference, reward.model)
        ]

    before = fingerprints()
    agent = make_agent(envs=envs)
    weights = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(64)
    assert fingerprints() == before
    assert any(not torch.equal(p, w) for p, w in zip(agent.policy.parameters(), weights, strict=True)), "vacuous"
    for model in (reference, reward.model):
        assert not model.training
        assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_rows_that_are_generated_for_nothing_are_said() -> None:
    with pytest.warns(UserWarning, match="num_envs=16 generates 16 and scores them all: with num_envs=6 fewer"):
        make_agent(episodes_per_update=6, minibatch_size=2)
    with pytest.warns(UserWarning, match="num_envs=16 generates 48 and scores them all: with num_envs=12 fewer"):
        make_agent(episodes_per_update=35)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CutPromptsWarning)
        make_agent(episodes_per_update=28)


def test_an_update_has_as_many_episodes_as_were_asked_for() -> None:
    """16 rows do not divide 20 episodes; the prompts of rows that are not used stay in the queue."""
    agent = make_agent(episodes_per_update=20, minibatch_size=6)
    sizes: list[int] = []
    update = agent.update
    agent.update = lambda rollout, kl: (sizes.append(len(rollout)), update(rollout, kl))[1]  # type: ignore[method-assign]
    before = len(agent.base_env.progress()["prompt_queue"])
    assert agent.learn(40).episodes == 40
    assert sizes == [20, 20]
    after = len(agent.base_env.progress()["prompt_queue"])
    assert (before - after) % len(agent.base_env.prompts) == 40 % len(agent.base_env.prompts)


def test_options_run() -> None:
    agent = make_agent(
        envs=make_envs(min_new_tokens=3, kl_estimator="full", missing_eos_penalty=1.0),
        whiten_rewards=True,
        entropy_coef=0.01,
        target_kl=1e-9,
        bf16=True,
        anneal_learning_rate=False,
    )
    history: list[dict[str, float]] = []
    agent.learn(64, [lambda agent, metrics: history.append(metrics)])
    assert history[0]["val/response_tokens"] >= 4 or history[0]["val/ended_by_stop"] == 0
    assert history[1]["lr"] == 3e-3


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_gradient_checkpointing_changes_memory_alone(critic: str) -> None:
    agents = [make_agent(critic, gradient_checkpointing=on).learn(64) for on in (False, True)]
    assert_trained_alike(*(agent.policy.state_dict() for agent in agents), agents[0].config.learning_rate)


def test_a_callback_stops_the_run() -> None:
    assert make_agent().learn(3200, [lambda agent, metrics: False]).updates == 1


@pytest.mark.bit_for_bit
@pytest.mark.numerics
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_resume_bit_for_bit(tmp_path: Path, critic: str) -> None:
    whole = make_agent(critic).learn(128)
    part = make_agent(critic)
    part.learn(128, [lambda agent, metrics: agent.updates < 2])
    part.save(tmp_path / "agent")
    resumed = PPO.load(tmp_path / "agent", envs=make_envs()).learn(128)
    assert resumed.updates == whole.updates == 4
    for (name, expected), actual in zip(
        whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name


def test_predict() -> None:
    agent = make_agent()
    observation, _ = agent.envs.reset(seed=0)
    assert torch.equal(agent.predict(observation), agent.policy.act(observation, deterministic=True).action)


def test_a_language_model_or_its_name_is_a_policy(tmp_path: Path) -> None:
    lm = mock_lm()
    agent = PPO(lm, make_envs(), PPOConfig(episodes_per_update=16))
    assert agent.policy.lm is lm
    agent.learn(16)
    mock_lm().save_pretrained(tmp_path)
    assert PPO(str(tmp_path), make_envs(), PPOConfig(episodes_per_update=16)).policy.vocab_size == 258


@pytest.mark.parametrize(
    "policy", [None, 5, torch.nn.Linear(2, 2), TokenModel(mock_lm())], ids=lambda p: type(p).__name__
)
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(TypeError, match=r"pass ActorCritic.from_pretrained\(name_or_model\)"):
        PPO(policy, make_envs())
    with pytest.raises(TypeError, match=r"pass ActorCritic.from_pretrained\(name_or_model\)"):
        SFT(policy, [{"prompt": "a", "completion": "b"}])


def test_an_agent_keeps_its_environment() -> None:
    agent = make_agent()
    with pytest.raises(AttributeError, match=r"a PPO keeps the environment .* PPO.load\(folder, envs=...\)"):
        agent.envs = make_envs()
