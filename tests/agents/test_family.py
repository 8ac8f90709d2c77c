"""The on-policy agents together: they resume, accumulate gradients, and estimate the true gradient."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym import agents
from textgym.agents import A2C, GRPO, NLPO, PPO, REINFORCE, RLOO, ExpertIteration, OnlineDPO
from textgym.agents.common.policy_gradient import PolicyGradientAgent
from textgym.agents.common.rollout import collect
from textgym.errors import CutPromptsWarning
from textgym.models.actor_critic import ActorCritic
from textgym.testing import (
    ExactTask,
    Measured,
    assert_close,
    assert_learns,
    assert_trained_alike,
    byte_tokenizer,
    mock_lm,
    terms_of,
    tolerance,
)

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

pytestmark = pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")  # tested below

GROUPS = {"group_size": 4}
AGENTS: dict[str, tuple[type[PolicyGradientAgent], dict[str, Any]]] = {
    "reinforce": (REINFORCE, {}),
    "reinforce, learned": (REINFORCE, {"baseline": "learned"}),
    "a2c": (A2C, {}),
    "a2c, n steps": (A2C, {"estimator": "n_step", "n_steps": 2}),
    "ppo": (PPO, {"minibatch_size": 8}),
    "ppo, penalty": (PPO, {"minibatch_size": 8, "variant": "penalty"}),
    "ppo, KL in loss": (PPO, {"minibatch_size": 8, "kl_in": "loss"}),
    "nlpo": (NLPO, {"minibatch_size": 8, "mask_update_interval": 2}),
    "grpo": (GRPO, GROUPS),
    "grpo, KL in loss": (GRPO, {**GROUPS, "kl_in": "loss", "kl_gradient": "sequence", "loss_type": "grpo"}),
    "rloo": (RLOO, GROUPS),
    "rloo, batch": (RLOO, {**GROUPS, "normalise": "batch"}),
    "expert iteration": (ExpertIteration, GROUPS),
    "online dpo": (OnlineDPO, {**GROUPS, "minibatch_size": 4}),
}


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def make_envs(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": ["one", "three", "a longer prompt"],
        "tokenizer": byte_tokenizer(),
        "reward": vowels,
        "stop": list(range(0, 256, 8)),  # so that lengths differ
        "reference": mock_lm(),
        "kl_coef": 0.02,
        "kl_mode": "deferred",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=16, **{**settings, **changes})


def make_agent(name: str, envs: Any = None, **changes: Any) -> PolicyGradientAgent:
    kind, settings = AGENTS[name]
    config = {"episodes_per_update": 32, "learning_rate": 3e-3, **settings, **changes}
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    return kind(policy, envs if envs is not None else make_envs(), kind.config_class(**config))


def history_of(agent: PolicyGradientAgent, episodes: int, *callbacks: Any) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    agent.learn(episodes, [lambda _, metrics: history.append(metrics), *callbacks])
    return history


@pytest.mark.parametrize("name", ["ppo, KL in loss", "grpo, KL in loss"])
def test_without_a_penalty_the_loss_has_no_kl_and_needs_no_pass_of_the_reference(name: str) -> None:
    agent = make_agent(name, make_envs(kl_coef=0.0))
    [metrics] = history_of(agent, 32)
    assert "loss/kl_avg" not in metrics
    assert agent.reference_log_probs is None


@pytest.mark.parametrize("name", AGENTS)
def test_starts_at_its_reference_and_reports_finite_numbers(name: str) -> None:
    """test_optimality.py tests that each of them learns."""
    history = history_of(make_agent(name), 96)
    assert history[0]["objective/kl"] == pytest.approx(0.0, abs=ROUNDING)
    assert history[-1]["objective/kl"] != history[0]["objective/kl"]
    assert np.isfinite([value for metrics in history for value in metrics.values()]).all()


@pytest.mark.bit_for_bit
@pytest.mark.parametrize(
    "name",
    [
        "ppo, penalty",
        "grpo, KL in loss",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("reinforce, learned", "nlpo", "rloo")),
    ],
)
def test_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = make_agent(name).learn(160)
    part = make_agent(name)
    part.learn(160, [lambda agent, _: agent.updates < 3])
    part.save(tmp_path / "agent")
    resumed = type(part).load(tmp_path / "agent", envs=make_envs()).learn(160)
    assert resumed.updates == whole.updates == 5
    for (key, expected), actual in zip(
        whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), key


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("name", ["ppo", pytest.param("nlpo", marks=pytest.mark.slow)])
def test_resume_bit_for_bit_under_lora(name: str, tmp_path: Path) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def make() -> PolicyGradientAgent:
        kind, settings = AGENTS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            policy = ActorCritic.from_pretrained(mock_lm(), critic="separate", lora=lora)
        config = {"episodes_per_update": 32, "learning_rate": 3e-3, **settings}
        return kind(policy, make_envs(reference=None), kind.config_class(**config))

    whole, part = make().learn(160), make()
    part.learn(160, [lambda agent, _: agent.updates < 3])
    part.save(tmp_path / "agent")
    resumed = type(part).load(tmp_path / "agent", envs=make_envs(reference=None)).learn(160)
    trained = {key for key, weight in whole.policy.named_parameters() if weight.requires_grad}
    assert all("lora" in key or key.startswith("value_head") for key in trained)
    assert any(key.startswith("critic") for key in trained)
    for (key, expected), actual in zip(
        whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), key


@pytest.mark.parametrize("name", ["reinforce", "a2c", "ppo", "grpo", "grpo, KL in loss", "rloo"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(name: str) -> None:
    gradients = []
    for micro_batch_size in (None, 5):
        agent = make_agent(name, episodes_per_update=32, micro_batch_size=micro_batch_size, learning_rate=0.0)
        if "minibatch_size" in AGENTS[name][1]:
            agent.config.minibatch_size = None
        agent.config.num_epochs = 1
        taken: list[torch.Tensor] = []
        agent.optimizer.register_step_pre_hook(lambda *_, agent=agent, taken=taken: taken.append(gradient_of(agent)))
        agent.config.max_grad_norm = 1e9
        agent.learn(32)
        gradients.append(taken[0])
    assert gradients[0].norm() > 1e-3
    assert_close(gradients[1], gradients[0], terms=FORWARD, scale=1.0)


def gradient_of(agent: PolicyGradientAgent) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None])


def test_adams_epsilon_keeps_the_first_update_modest() -> None:
    """A first step of Adam moves each weight by the learning rate, unless its gradient is small beside epsilon."""
    default = agents.PPOConfig()
    assert default.adam_epsilon == 1e-5
    moved = []
    for epsilon in (1e-1, default.adam_epsilon):
        changes = {"adam_epsilon": epsilon, "learning_rate": default.learning_rate, "minibatch_size": 32}
        agent = make_agent("ppo", num_epochs=1, **changes)
        assert agent.optimizer.param_groups[0]["eps"] == epsilon
        rollout = collect(agent.envs, agent.policy)
        before = agent.policy.sequence_log_probs(rollout.sequences)
        agent.learn(32)
        moved.append(float((agent.policy.sequence_log_probs(rollout.sequences) - before).abs().max()))
    assert 0 < moved[0] < 0.5 * moved[1]
    assert moved[1] < 0.1


# --- the estimators against the exact gradient ---

TASK = ExactTask(vocab_size=5, horizon=3, seed=1)
BETA = 0.3


def exact_gradient(share: float = 1.0) -> torch.Tensor:
    """Of share E[r] - beta KL(pi, pi_ref) at a policy that is not the reference, by enumeration."""
    policy = exact_policy()
    log_probs = TASK.differentiable_log_probs(policy).double()
    rewards, reference = torch.tensor(TASK.rewards), torch.tensor(TASK.log_reference)
    objective = (log_probs.exp() * (share * rewards - BETA * (log_probs - reference))).sum()
    return torch.autograd.grad(objective, policy.lm.model.logits.weight)[0]


def exact_policy() -> ActorCritic:
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    with torch.no_grad():
        noise = torch.randn(policy.lm.model.logits.weight.shape, generator=torch.Generator().manual_seed(5))
        policy.lm.model.logits.weight += 0.5 * noise
        policy.value_head.weight.fill_(0.2)  # a critic that is wrong: it may not move the mean
    return policy


# PPO's losses are means over tokens, and whitened advantages have another scale.
WHOLE = {"lam": 1.0, "value_coef": 0.0, "whiten_advantages": False, "minibatch_size": None}
ESTIMATORS: dict[str, tuple[type[PolicyGradientAgent], dict[str, Any]]] = {
    "whole episode": (REINFORCE, {"reward_to_go": False, "baseline": "none"}),
    "to go": (REINFORCE, {"baseline": "none"}),
    "mean baseline": (REINFORCE, {"baseline": "mean"}),
    "learned baseline": (REINFORCE, {"baseline": "learned", "value_coef": 0.0}),
    "ppo": (PPO, {**WHOLE, "num_epochs": 1}),
    "ppo, penalty": (PPO, {**WHOLE, "num_epochs": 1, "variant": "penalty"}),
    "nlpo, wide open": (NLPO, {**WHOLE, "num_epochs": 1, "top_p": 1.0}),
    "a2c, all steps": (A2C, {"lam": 1.0, "value_coef": 0.0}),
    "rloo": (RLOO, GROUPS),
    "grpo, not scaled": (GRPO, {**GROUPS, "scale": "none", "loss_type": "dr_grpo"}),
    "grpo, KL in loss": (GRPO, {**GROUPS, "scale": "none", "loss_type": "dr_grpo", "kl_in": "loss"}),
}
FAST = ("ppo", "rloo")
# Dr. GRPO divides by the longest length, and an episode is part of the mean of its group of 4.
FACTORS = {"grpo, not scaled": 3 * 4 / 3, "grpo, KL in loss": 3.0}
SHARES = {"grpo, KL in loss": 3 / 4}


def estimates(name: str, batches: int = 40, shift: float = 0.0, value: float | None = None) -> np.ndarray:
    """Gradients of the loss, one for each of many batches of 256 episodes, `(batches, weights)`.

    Of means over tokens they are made those of sums, by the tokens that an episode of the batch has on average; and of
    losses in standard deviations of the returns those in units of reward.
    """
    kind, settings = ESTIMATORS[name]
    arguments = TASK.env_kwargs(BETA) | {"reward": lambda completion_ids: np.array(TASK.score(completion_ids)) + shift}
    envs = gym.make_vec("textgym/Text-v0", num_envs=256, kl_mode="deferred", **arguments)
    config = kind.config_class(episodes_per_update=256, learning_rate=0.0, max_grad_norm=1e9, **settings)
    agent = kind(exact_policy(), envs, config)
    if value is not None:  # a critic that says so of every state
        with torch.no_grad():
            agent.policy.value_head.weight.zero_()
            agent.policy.value_head.bias.fill_(value)
    taken: list[np.ndarray] = []
    weight = agent.policy.lm.model.logits.weight

    def take(*_: Any) -> None:
        unit = float(agent.value_std) if isinstance(agent, A2C | REINFORCE) else 1.0
        taken.append(unit * weight.grad.flatten().numpy())

    agent.optimizer.register_step_pre_hook(take)
    tokens: list[float] = []
    agent.learn(256 * batches, [lambda _, metrics: tokens.append(metrics["val/response_tokens"])])
    scale = np.array(tokens)[:, None] if isinstance(agent, PPO) else 1.0
    return np.array(taken) * scale


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ESTIMATORS]
)
def test_estimators_agree_with_the_exact_gradient(name: str) -> None:
    """Over 40 batches, in the direction of the gradient and in length across it.

    The bars are so wide that other samples fail one of the 22 comparisons with a chance below 1 in 10,000. Student's t
    with 39 degrees of freedom is beyond 5.4 with a chance of 4e-6. |off|^2 / variance is about chi^2(n) / n with n from
    9 to 12 (measured: (trace C)^2 / trace C^2 of the covariance C of the batches), above 5.5 with a chance below 1e-6.
    The narrow error keeps the power: a factor k / (k - 1) = 4 / 3 of a group of 4, or 3 / 4, is off by eight errors.
    """
    exact = exact_gradient(SHARES.get(name, 1.0)).flatten().numpy()
    sampled = -FACTORS.get(name, 1.0) * estimates(name)
    along = sampled @ exact / (exact @ exact)  # 1 on average
    error = along.std(ddof=1) / np.sqrt(len(along))
    assert abs(along.mean() - 1) < 5.4 * error
    assert error < 0.03
    off = sampled.mean(0) - exact
    variance = sampled.var(0, ddof=1).sum() / len(sampled)  # what |off|^2 is on average, if unbiased
    assert off @ off < 5.5 * variance


@functools.cache
def spread(name: str) -> float:
    """Variance of the estimates of rewards that are all near 3, which says nothing of any token."""
    return float(estimates(name, 20, shift=3.0, value=3.0).var(0, ddof=1).sum())


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["mean baseline", "rloo", "learned baseline"])
def test_baselines_lower_the_variance(baseline: str) -> None:
    """Measured ratios are 0.06 to 0.08; their logarithms differ by 0.1 between samples, so 0.4 is 15 deviations off."""
    assert spread(baseline) < 0.4 * spread("to go")


# --- what belongs to one of them ---


@pytest.mark.slow
def test_ppo_penalty_steers_its_coefficient() -> None:
    far = make_agent("ppo, penalty", kl_min=1e-12, kl_max=1e-11)
    history = history_of(far, 96)
    assert [row["policy/penalty_coef"] for row in history] == [1.0, 2.0, 4.0]
    near = make_agent("ppo, penalty", kl_min=1e8, kl_max=1e9)
    assert [row["policy/penalty_coef"] for row in history_of(near, 96)] == [1.0, 0.5, 0.25]


@pytest.mark.slow
def test_a_dear_penalty_keeps_the_policy_near_the_old_one() -> None:
    """By the logarithm of how much nearer it stays: 0 if the penalty did nothing."""
    nearer = []
    for seed in range(3):
        free, dear = (
            history_of(make_agent("ppo, penalty", penalty_coef=coef, learning_rate=1e-2, seed=seed), 32)[0]
            for coef in (0.0, 100.0)
        )
        nearer.append(float(np.log(free["policy/kl_old_new"] / dear["policy/kl_old_new"])))
    assert_learns(nearer, at_least=0.4, measured=Measured(mean=2.22, standard_deviation=0.36, runs=8))


def test_groups_share_their_prompt() -> None:
    agent = make_agent("grpo")
    rollout = agent.play()
    prompts = [
        tuple(row[:length])
        for row, length in zip(
            rollout.sequences.input_ids.tolist(), rollout.sequences.prompt_lengths.tolist(), strict=True
        )
    ]
    for start in range(0, 32, 4):
        assert len(set(prompts[start : start + 4])) == 1
    assert len(set(prompts)) == 3


def test_grpo_leaves_groups_without_spread_out_and_counts_them() -> None:
    def by_prompt(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [
            0.0 if prompt == "one" else float(len(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    agent = make_agent("grpo", make_envs(reward=by_prompt, kl_coef=0.0))
    seen: list[int] = []
    evaluate = agent.evaluate
    agent.evaluate = lambda policy, batch: (seen.append(len(batch)), evaluate(policy, batch))[1]  # type: ignore[method-assign]
    rollout_size = 32
    metrics = history_of(agent, rollout_size)[0]
    flat = round(metrics["frac_reward_zero_std"] * 8)
    assert flat >= 1
    assert sum(seen) == rollout_size - 4 * flat
    nothing = make_agent("grpo", make_envs(reward=lambda completions: [1.0] * len(completions), kl_coef=0.0))
    before = {name: weight.clone() for name, weight in nothing.policy.state_dict().items()}
    assert history_of(nothing, 32)[0]["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(weight, before[name]) for name, weight in nothing.policy.state_dict().items())


@pytest.mark.parametrize(
    ("loss_type", "micro_batch_size"), [("grpo", None), ("dr_grpo", 5), ("dapo", None), ("dapo", 5), ("bnpo", None)]
)
def test_groups_without_spread_count_in_the_means_of_the_loss(loss_type: str, micro_batch_size: int | None) -> None:
    """Left out of them, as they cost no pass, they would make the gradient of the others larger."""
    agent = make_agent("grpo", make_envs(kl_coef=0.0), loss_type=loss_type, micro_batch_size=micro_batch_size)
    rollout = agent.play()
    score = torch.arange(32.0).view(8, 4)
    score[[0, 2, 3, 5, 6, 7]] = 1.0  # 6 of 8 groups are flat
    last = rollout.sequences.response_lengths[:, None] - 1
    rollout.rewards.zero_().scatter_(1, last, score.view(-1, 1))

    agent.optimizer.step = lambda: None  # type: ignore[method-assign]

    def gradients() -> dict[str, torch.Tensor]:
        agent.update(rollout, torch.zeros_like(rollout.log_probs))
        return {name: x.grad.clone() for name, x in agent.policy.named_parameters() if x.grad is not None}

    found = gradients()
    minibatches = agent.minibatches
    # Every episode takes part in a pass, and those of flat groups have an advantage of 0.
    agent.minibatches = lambda *given, rows, with_gradient: minibatches(*given, rows=rows)  # type: ignore[method-assign]
    expected = gradients()
    assert any(bool(gradient.any()) for gradient in expected.values())
    for name, gradient in found.items():
        assert_close(gradient, expected[name], terms=FORWARD, scale=float(expected[name].abs().max()))


@pytest.mark.parametrize("settings", [{"entropy_coef": 0.1}, {"kl_in": "loss"}])
def test_groups_without_spread_keep_their_entropy_and_their_kl(settings: dict[str, Any]) -> None:
    envs = make_envs(reward=lambda completions: [1.0] * len(completions), kl_coef=0.1 if "kl_in" in settings else 0.0)
    agent = make_agent("grpo", envs, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in agent.policy.lm.parameters():  # away from the reference
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    start = {name: weight.clone() for name, weight in agent.policy.lm.named_parameters()}
    assert history_of(agent, 32)[0]["frac_reward_zero_std"] == 1.0
    assert any(not torch.equal(weight, start[name]) for name, weight in agent.policy.lm.named_parameters())


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_the_kl_of_texts_in_the_loss_is_the_formula_by_hand(kind: Any) -> None:
    """The exact KL of each state, and each token's log-prob times the KL that follows, less that of the other texts."""
    settings: dict[str, Any] = {"kl_in": "loss", "kl_gradient": "sequence", "episodes_per_update": 16}
    settings |= (
        {**GROUPS, "loss_type": "dapo"}
        if kind is GRPO
        else {"value_coef": 0.0, "num_epochs": 1, "minibatch_size": None}
    )
    envs = make_envs(reward=lambda completions: [1.0] * len(completions), kl_coef=0.1)
    agent = kind(ActorCritic.from_pretrained(mock_lm(seed=2), critic="separate"), envs, kind.config_class(**settings))
    rollout = agent.play()
    agent.measure_kl(rollout)
    size = 4 if kind is GRPO else 16

    later, states = torch.zeros(rollout.log_probs.shape), []  # KL after each token; KL of each state
    log_probs = []
    for row, ids in enumerate(rollout.sequences.input_ids):
        first = int(rollout.sequences.prompt_lengths[row])
        length = int(rollout.sequences.response_lengths[row])
        p, q = (
            lm(input_ids=ids[None, : first + length]).logits[0, first - 1 : -1].log_softmax(-1)
            for lm in (agent.policy.lm, agent.penalty.reference.lm)
        )
        kl = (p.exp() * (p - q.detach())).sum(-1)
        later[row, :length] = kl.detach().sum() - kl.detach().cumsum(0)
        states.append(kl)
        log_probs.append(p.gather(1, ids[first : first + length, None])[:, 0])
    total = torch.zeros(())
    for row, (kl, log_prob) in enumerate(zip(states, log_probs, strict=True)):
        others = [other for other in range(row // size * size, row // size * size + size) if other != row]
        for step in range(len(kl)):
            same = [float(later[other, step]) for other in others if len(states[other]) > step]
            baseline = sum(same) / len(same) if same else 0.0
            total = total + kl[step] + log_prob[step] * (later[row, step] - baseline)
    expected = torch.autograd.grad(0.1 * total / sum(map(len, states)), list(agent.policy.lm.parameters()))

    [batch] = agent.minibatches(rollout, torch.zeros_like(rollout.log_probs))
    loss, metrics = agent.loss(agent.evaluate(agent.policy, batch), batch)
    gradients = torch.autograd.grad(loss, list(agent.policy.lm.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, by_hand in zip(gradients, expected, strict=True):
        assert_close(gradient, by_hand, terms=FORWARD, scale=10 * largest)
    assert metrics["loss/kl_avg"] > 0


def test_a_clamped_kl_is_refused_in_the_loss() -> None:
    """Beyond the bound it would have no gradient."""
    for name in ("grpo, KL in loss", "ppo, KL in loss"):
        with pytest.raises(ValueError, match="kl_clamp=2\\.0 would remove the gradient of a larger KL in the loss"):
            make_agent(name, make_envs(kl_clamp=2.0))
    make_agent("grpo", make_envs(kl_clamp=2.0))


@pytest.mark.parametrize(
    ("settings", "estimator"), [({"top_p": 0.5}, "k1"), ({"top_p": 0.9, "min_tokens_to_keep": 3}, "k3")]
)
def test_without_a_step_the_penalised_distance_to_the_old_policy_is_zero(
    settings: dict[str, Any], estimator: str
) -> None:
    """Both sides are the distribution that was sampled from, within the mask."""
    envs = make_envs(kl_estimator=estimator)
    agent = make_agent("nlpo", envs, variant="penalty", learning_rate=0.0, **settings)
    for metrics in history_of(agent, 96):
        assert metrics["policy/kl_old_new"] == pytest.approx(0.0, abs=ROUNDING)


@pytest.mark.parametrize("min_score", [None, 1.0])
def test_expert_iteration_imitates_the_best_of_each_group(min_score: float | None) -> None:
    agent = make_agent("expert iteration", make_envs(kl_coef=0.0), keep=2, min_score=min_score)
    seen: list[torch.Tensor] = []
    evaluate = agent.evaluate
    agent.evaluate = lambda policy, batch: (seen.append(batch.indices), evaluate(policy, batch))[1]  # type: ignore[method-assign]
    rollout = agent.play()
    metrics = agent.update(rollout, torch.zeros_like(rollout.log_probs))
    scores = rollout.scores.view(-1, 4)
    second = scores.sort(1, descending=True).values[:, 1:2]
    for index in torch.cat(seen).tolist():
        assert scores[index // 4, index % 4] >= second[index // 4, 0]
        assert min_score is None or scores[index // 4, index % 4] >= min_score
    at_least = scores >= (0.0 if min_score is None else min_score)
    expected = at_least.sum(1).clamp(max=2).sum()
    assert metrics["val/kept"] * 32 == sum(map(len, seen)) == expected


def test_advantages_of_reinforce_plus_plus_are_those_of_rloo_whitened_over_the_rollout() -> None:
    agent: Any = make_agent("rloo")
    rollout = agent.play()
    kl, mask = agent.measure_kl(rollout), rollout.response_mask
    found: dict[str, torch.Tensor] = {}
    agent.minibatches = lambda rollout, advantages, **_: setattr(agent, "advantages", advantages) or iter(())
    for name in ("none", "batch"):
        agent.config.normalise = name
        agent.update(rollout, kl)
        found[name] = agent.advantages[mask]
    plain = found["none"]
    assert plain.std() > 0.1
    assert_close(found["batch"], (plain - plain.mean()) / plain.std(correction=0), terms=int(mask.sum()))


@pytest.mark.slow
def test_nlpo_wide_open_is_ppo() -> None:
    vectors = []
    for name, changes in (("ppo", {}), ("nlpo", {"top_p": 1.0, "mask_update_interval": 20})):
        agent = make_agent(name, **changes).learn(96)
        vectors.append(torch.cat([p.flatten() for p in agent.policy.parameters()]).detach())
    assert_trained_alike(*vectors, agent.config.learning_rate)


def test_nlpo_starts_at_ratio_one() -> None:
    for metrics in history_of(make_agent("nlpo", top_p=0.8, learning_rate=0.0), 64):
        assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-3)
        assert metrics["policy/clipfrac_avg"] == 0


def test_nlpo_learns_under_the_mask_it_sampled_with_in_bf16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("nlpo", top_p=0.8, learning_rate=0.0, bf16=True, num_epochs=1)
    used: list[tuple[Any, torch.Tensor]] = []
    allowed = NLPO.allowed

    def noted(self: NLPO, sequences: Any) -> torch.Tensor:
        used.append((sequences, allowed(self, sequences)))
        return used[-1][1]

    monkeypatch.setattr(NLPO, "allowed", noted)
    agent.learn(32)
    assert len(used) == 1 + 4, "a KL and four minibatches"
    for sequences, mask in used:
        assert torch.equal(mask, allowed(agent, sequences))


def test_nlpo_says_what_k1_means() -> None:
    with pytest.warns(UserWarning, match="filtered by TopPMask and the KL estimator is 'k1'"):
        make_agent("nlpo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CutPromptsWarning)  # one prompt is too long on purpose
        make_agent("nlpo", make_envs(kl_estimator="k3"))
        make_agent("nlpo", top_p=1.0, mask_update_interval=20)


def test_nlpo_chooses_within_the_mask() -> None:
    agent = make_agent("nlpo", top_p=0.3, min_tokens_to_keep=2)
    rollout = agent.play()
    allowed = agent.allowed(rollout.sequences)  # type: ignore[attr-defined]
    assert allowed.sum(1).max() < 258 / 2
    assert allowed.sum(1).min() >= 2
    free = agent.policy.sequence_log_probs(rollout.sequences)
    assert (rollout.log_probs >= free - ROUNDING).all(), "the mass outside the mask is shared by what is inside"


def test_nlpo_refuses_a_kl_over_the_whole_vocabulary_when_it_is_made() -> None:
    """Samples from within the mask say nothing of the tokens outside."""
    with pytest.raises(ValueError, match=r"kl_estimator='full'.*within the mask.*use kl_estimator='k1'"):
        make_agent("nlpo", make_envs(kl_estimator="full"))


def test_nlpo_is_silent_of_k1_where_there_is_no_penalty() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CutPromptsWarning)  # one prompt is too long on purpose
        make_agent("nlpo", make_envs(kl_coef=0.0))


@pytest.mark.parametrize("name", ["expert iteration", "online dpo"])
def test_the_first_step_is_made_at_the_policy_that_sampled(name: str) -> None:
    [metrics] = history_of(make_agent(name, minibatch_size=None, num_epochs=1, episodes_per_update=16), 16)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0.0, abs=ROUNDING)


@pytest.mark.parametrize("baseline", ["none", "mean", "learned"])
def test_the_variance_that_a_critic_explains_is_reported_where_there_is_a_critic(baseline: str) -> None:
    agent: Any = make_agent("reinforce", baseline=baseline)
    agent.minibatches = lambda *_: iter(())
    rollout = agent.play()
    metrics = agent.update(rollout, agent.measure_kl(rollout))
    assert ("val/explained_variance" in metrics) == (baseline == "learned")


def test_nlpos_mask_is_refreshed_after_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    agent: Any = make_agent("nlpo", mask_update_interval=3)
    refreshed: list[int] = []
    monkeypatch.setattr(PPO, "update", lambda *_: {})
    monkeypatch.setattr(agent.mask, "refresh", lambda policy: refreshed.append(agent.updates + 1))
    for done in range(7):
        agent.updates = done
        agent.update(None, None)
    assert refreshed == [3, 6]


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo", "expert iteration", "online dpo"])
@pytest.mark.parametrize(("share", "steps"), [(1.5, 4), (1.75, 1)])
def test_an_update_ends_with_the_first_step_above_one_and_a_half_of_target_kl(
    name: str, share: float, steps: int
) -> None:
    agent = make_agent(name, target_kl=0.5, minibatch_size=None, num_epochs=4)
    made: list[Any] = []
    metrics = {"policy/approxkl_avg": torch.tensor(0.5 * share), "val/grad_norm": torch.tensor(1.0)}
    agent.step = lambda batch: made.append(batch) or metrics  # type: ignore[method-assign, func-returns-value]
    rollout = agent.play()
    agent.update(rollout, agent.measure_kl(rollout))
    assert len(made) == steps


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "fresh"), [(2, [False, True, False, True]), (None, [False] * 4)])
def test_nlpos_mask_is_the_policy_of_each_refresh(interval: int | None, fresh: list[bool]) -> None:
    agent = make_agent("nlpo", mask_update_interval=interval)
    equal: list[bool] = []

    def look(agent: Any, _: Any) -> None:
        mask, policy = agent.mask.model.lm.state_dict(), agent.policy.lm.state_dict()
        equal.append(all(torch.equal(mask[name], policy[name]) for name in policy))

    agent.learn(32 * 4, [look])
    assert equal == fresh


def test_settings_at_the_edge_of_what_is_allowed_are_taken() -> None:
    agents.ExpertIterationConfig(keep=8, group_size=8)
    agents.DQNConfig(backup="soft", n_quantiles=1)
    assert make_agent("grpo", episodes_per_update=4).learn(4).updates == 1, "an update of one group"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: agents.REINFORCEConfig(num_epochs=2), "for only one step"),
        (lambda: agents.A2CConfig(minibatch_size=4), "for only one step"),
        (lambda: agents.A2CConfig(n_steps=0), "n_steps must be at least 1"),
        (lambda: agents.PPOConfig(dual_clip=0.5), "dual_clip must be above 1"),
        (lambda: agents.ExpertIterationConfig(keep=9), "keep must be from 1 to group_size=8"),
        (
            lambda: agents.PPOConfig(variant="penalty", kl_min=0.1, kl_max=0.01),
            "kl_min must be below kl_max=0.01, got 0.1",
        ),
        (lambda: agents.NLPOConfig(kl_in="loss"), "leave kl_in='reward', or use PPO"),
        (lambda: agents.NLPOConfig(mask_update_interval=0), "mask_update_interval must be at least 1"),
        (lambda: make_agent("grpo", group_size=5), "whole groups of group_size=5: the nearest is 30 or 35"),
        (lambda: make_agent("rloo", group_size=1), "at least 2"),
    ],
)
def test_bad_settings_are_explained(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
