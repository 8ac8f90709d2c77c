"""What agents with a critic share: a scale of the values, settings of a separate critic, and its start alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym import agents
from textgym.agents import A2C, NLPO, PPO, REINFORCE
from textgym.agents.common.rollout import collect
from textgym.agents.objectives.critic_agent import CriticAgent
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import ExactTask, Measured, assert_learns, assert_trained_alike, byte_tokenizer, mock_lm

LEARNING_RATE = 3e-3
PROMPTS = ["one", "three", "x"]
AGENTS: dict[str, tuple[type[CriticAgent], dict[str, Any]]] = {
    "ppo": (PPO, {"minibatch_size": 8}),
    "a2c": (A2C, {}),
    "a2c, whitened": (A2C, {"whiten_advantages": True}),
    "a2c, q": (A2C, {"estimator": "q"}),
    "reinforce": (REINFORCE, {"baseline": "learned"}),
    "nlpo": (NLPO, {"minibatch_size": 8}),
}
pytestmark = pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")


def vowels(completions: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) + 0.1 * len(text) for text in completions]


def make_agent(
    name: str = "ppo",
    critic: str = "separate",
    scale: float = 1.0,
    shift: float = 0.0,
    prompts: Sequence[str] = PROMPTS,
    **changes: Any,
) -> Any:
    """An agent whose rewards are in another unit: `scale` times the usual ones, plus `shift`."""
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=16,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [scale * score + shift for score in vowels(completions)],
        stop=list(range(0, 256, 8)),  # so that lengths differ
        reference=mock_lm(seed=5),
        kl_coef=0.02 * scale,
        max_new_tokens=6,
    )
    kind, settings = AGENTS[name]
    config = {"episodes_per_update": 16, "learning_rate": LEARNING_RATE, **settings, **changes}
    return kind(ActorCritic.from_pretrained(mock_lm(), critic=critic), envs, kind.config_class(**config))


def weights_of(agent: CriticAgent) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in agent.policy.named_parameters()}


@pytest.mark.parametrize(
    ("name", "critic"),
    [
        ("ppo", "shared"),
        ("ppo", "separate"),
        *(
            pytest.param(name, critic, marks=pytest.mark.slow)
            for name in AGENTS
            for critic in ("shared", "separate")
            if (name, critic) not in (("ppo", "shared"), ("ppo", "separate"))
        ),
    ],
)
def test_the_unit_of_the_rewards_makes_no_difference(name: str, critic: str) -> None:
    """Rewards times 128 plus 1,024: the same weights after a few updates, and others without the scale.

    Q has no gradient for the policy before it was trained, so it takes four updates.
    """
    episodes = 64 if name == "a2c, q" else 32
    trained = [make_agent(name, critic, *unit).learn(episodes) for unit in ((1.0, 0.0), (128.0, 1024.0))]
    assert_trained_alike(*(weights_of(agent) for agent in trained), LEARNING_RATE)
    first, second = (agent.policy.value_head for agent in trained)
    assert second.mean.item() == pytest.approx(128 * first.mean.item() + 1024, rel=1e-5)
    assert second.std.item() == pytest.approx(128 * first.std.item(), rel=1e-4)
    plain = [
        make_agent(name, critic, *unit, normalise_values=False).learn(episodes)
        for unit in ((1.0, 0.0), (128.0, 1024.0))
    ]
    with pytest.raises(AssertionError, match="of the learning rate apart"):
        assert_trained_alike(*(weights_of(agent) for agent in plain), LEARNING_RATE)


def gain_of(name: str, critic: str, scale: float, shift: float, **changes: Any) -> float:
    """The share of the way to the optimum; exact, so that a policy that does not move gains 0."""
    kind, settings = AGENTS[name]
    task = ExactTask(vocab_size=5, horizon=2, model="transformer", seed=1)
    arguments = task.env_kwargs(0.3)
    arguments["reward"] = lambda completion_ids: [scale * r + shift for r in task.score(completion_ids)]
    arguments["kl_coef"] = 0.3 * scale
    envs = gym.make_vec("textgym/Text-v0", num_envs=128, **arguments)
    policy = ActorCritic.from_pretrained(task.language_model(), critic=critic)
    further = settings | ({"minibatch_size": 64} if kind is PPO else {}) | changes
    config = kind.config_class(**{"episodes_per_update": 128, "learning_rate": 3e-3, **further})
    kind(policy, envs, config).learn(128 * (10 if kind is PPO else 30))
    return float(task.optimum(0.3).gap_closed(task.log_probs(policy)))


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_learning_curve_is_the_same_in_another_unit(critic: str) -> None:
    """That it learns fails falsely with a chance of 5e-6.

    Gains in two units differed by less than 1e-6 in 8 runs. If rounding changes a sampled token, they differ as those
    of two seeds do, with a standard deviation of 0.008.
    """
    plain = [gain_of("ppo", critic, 1.0, 0.0, seed=seed) for seed in range(2)]
    other = [gain_of("ppo", critic, 128.0, 1024.0, seed=seed) for seed in range(2)]
    assert_learns(plain, at_least=0.5, measured=Measured(mean=0.863, standard_deviation=0.0068, runs=4))
    assert np.mean(other) == pytest.approx(np.mean(plain), abs=0.05)


@pytest.mark.slow
def test_the_learning_curve_without_a_scale_or_a_learning_rate_is_another() -> None:
    assert gain_of("ppo", "shared", 1.0, 0.0, learning_rate=0.0) == pytest.approx(0, abs=1e-6)
    assert gain_of("ppo", "shared", 128.0, 1024.0, normalise_values=False) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "critic"),
    [(name, critic) for name in ("a2c", "reinforce") for critic in ("shared", "separate")] + [("a2c, q", "separate")],
)
def test_the_learning_curve_of_other_agents_is_the_same_in_another_unit(name: str, critic: str) -> None:
    """Q on a shared trunk takes longer than these 30 updates: it closed 0.12 of the gap."""
    plain, other = gain_of(name, critic, 1.0, 0.0), gain_of(name, critic, 128.0, 1024.0)
    assert plain > 0.3
    assert other == pytest.approx(plain, abs=0.02)


@pytest.mark.numerics
def test_a_large_value_loss_leaves_the_policys_step_alone() -> None:
    """Value and policy share no weights, so `value_coef` may not change the policy, however large the value loss is."""
    trained = [make_agent(scale=100.0, value_coef=coef, normalise_values=False).learn(16) for coef in (0.0, 1.0, 100.0)]
    for agent in trained[1:]:
        for name, weight in trained[0].policy.lm.named_parameters():
            assert_trained_alike(agent.policy.lm.get_parameter(name).detach(), weight, LEARNING_RATE)
    assert not torch.equal(trained[0].policy.value_head.weight, trained[1].policy.value_head.weight)


@pytest.mark.parametrize(
    ("setting", "moved"),
    [({"critic_learning_rate": 0.0}, {"policy"}), ({"learning_rate": 0.0, "critic_learning_rate": 1e-3}, {"critic"})],
)
def test_a_separate_critic_has_its_own_learning_rate(setting: dict[str, float], moved: set[str]) -> None:
    agent = make_agent(normalise_values=False, **setting)
    before = weights_of(agent)
    agent.learn(32)
    changed = {name for name, weight in weights_of(agent).items() if not torch.equal(weight, before[name])}
    assert {"critic" if name.startswith(("critic", "value_head")) else "policy" for name in changed} == moved


def test_a_separate_critic_has_its_own_weight_decay_and_norm() -> None:
    agent = make_agent(weight_decay=0.1, critic_weight_decay=0.3, max_grad_norm=0.5, critic_max_grad_norm=0.02)
    assert {group["part"]: group["weight_decay"] for group in agent.optimizer.param_groups} == {
        "policy": 0.1,
        "critic": 0.3,
    }
    norms: list[list[float]] = []

    def look(*_: Any) -> None:
        parts = (
            [weight.grad for weight in group["params"] if weight.grad is not None]
            for group in agent.optimizer.param_groups
        )
        norms.append([float(torch.stack([gradient.norm() for gradient in part]).norm()) for part in parts])

    agent.optimizer.register_step_pre_hook(look)
    evaluation = agent.policy.evaluate(collect(agent.envs, agent.policy).sequences)
    (1e4 * (evaluation.log_prob.sum() + evaluation.value.sum())).backward()
    assert agent.apply_gradients(torch.zeros(())) > 1e3
    assert norms[0] == pytest.approx([0.5, 0.02], rel=1e-3)


@pytest.mark.parametrize(
    "setting",
    [
        {"critic_learning_rate": 0.0},
        {"critic_weight_decay": 0.1},
        {"critic_max_grad_norm": 1.0},
        {"freezing_actor_steps": 1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_a_separate_critic_are_refused_without_one(setting: dict[str, float]) -> None:
    name = next(iter(setting))
    with pytest.raises(ValueError, match=rf"{name}=.* is for a separate critic.*critic='separate'"):
        make_agent(critic="shared", **setting)
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be used with baseline='mean'"):
        agents.REINFORCEConfig(**setting)


def test_the_critic_is_trained_alone_at_first() -> None:
    agent = make_agent(freezing_actor_steps=2)
    before = weights_of(agent)
    moved: list[tuple[bool, bool]] = []

    def look(agent: Any, _: Any) -> None:
        now = weights_of(agent)
        changed = [name for name in before if not torch.equal(now[name], before[name])]
        moved.append(
            (any(name.startswith("lm") for name in changed), any(name.startswith("critic") for name in changed))
        )
        before.update(now)

    agent.learn(48, [look])
    assert moved == [(False, True), (False, True), (True, True)]


def test_what_responds_to_the_policy_waits_while_the_critic_is_trained_alone() -> None:
    """The coefficients of both penalties and the multipliers: while the policy stays, they would only grow or fall."""
    agent = make_agent(
        freezing_actor_steps=2,
        variant="penalty",
        kl_min=1.0,
        kl_max=2.0,
        constraints={"<lambda>": 0.0},
        minibatch_size=None,
    )
    agent.penalty.controller = AdaptiveKL(target=6.0, coef=0.5)
    seen: list[tuple[float, float, float]] = []

    def look(agent: Any, _: Any) -> None:
        seen.append((agent.penalty_coef, agent.penalty.coef, agent.constraints.multipliers["<lambda>"]))

    agent.learn(48, [look])
    assert seen[:2] == [(agent.config.penalty_coef, 0.5, 0.0)] * 2
    assert all(now != before for now, before in zip(seen[2], seen[1], strict=True))


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("critic", ["shared", pytest.param("separate", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_scale(critic: str, tmp_path: Path) -> None:
    whole, part = make_agent(critic=critic).learn(64), make_agent(critic=critic)
    part.learn(64, [lambda agent, _: agent.updates < 2])
    part.save(tmp_path / "agent")
    resumed = PPO.load(tmp_path / "agent", envs=make_agent().envs).learn(64)
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], tensor), name
    assert whole.policy.value_head.fits == 4


@pytest.mark.parametrize(
    ("lam", "expected"), [(None, [2.96, 3.2, 3.0]), (1.0, [3.0, 3.0, 3.0]), (0.0, [2.0, 4.0, 3.0])]
)
def test_targets_of_the_critic_have_a_lambda_of_their_own(lam: float | None, expected: list[float]) -> None:
    """A reward of 3 at the end, values (1, 2, 4) and lambda 0.8 for the advantages, which it does not change."""
    agent = make_agent(normalise_values=False, critic_lam=lam, lam=0.8, whiten_advantages=False)
    rollout = collect(agent.envs, agent.policy)
    rows = (rollout.sequences.response_lengths >= 3).nonzero()[:, 0]
    mask = rollout.response_mask
    rollout.values.zero_()[:, :3] = torch.where(mask[:, :3], torch.tensor([1.0, 2.0, 4.0]), 0.0)
    rollout.rewards.zero_().scatter_(1, rollout.sequences.response_lengths[:, None] - 1, 3.0)
    seen: list[torch.Tensor] = []
    agent.minibatches = lambda rollout, advantages, returns: seen.extend((advantages, returns)) or iter(())
    agent.update(rollout, torch.zeros_like(rollout.log_probs))
    row = next(int(row) for row in rows if rollout.sequences.response_lengths[row] == 3)
    assert seen[1][row, :3].tolist() == pytest.approx(expected)
    assert seen[0][row, :3].tolist() == pytest.approx([1.0 + 0.8 * (2.0 + 0.8 * -1.0), 2.0 + 0.8 * -1.0, -1.0])


@pytest.mark.parametrize(
    "name", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a2c", "reinforce"))]
)
def test_explained_variance_within_prompts_is_reported_if_prompts_have_several_rows(name: str) -> None:
    """Sixteen rows of three prompts; then one row each of sixteen prompts, in which the metric has no meaning."""
    reported: list[dict[str, float]] = []
    make_agent(name).learn(16, [lambda agent, metrics: reported.append(metrics)])
    make_agent(name, prompts=[f"prompt {i}" for i in range(16)]).learn(
        16, [lambda agent, metrics: reported.append(metrics)]
    )
    several, single = reported
    assert several["val/explained_variance_within_prompts"] <= 1
    assert "val/explained_variance_within_prompts" not in single
    assert math.isfinite(single["val/explained_variance"])
