"""Q-learning and the pathwise derivative: memory, Q-functions, targets, exploration, and what they end up with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import DQN, DQNConfig, Pathwise, PathwiseConfig, dqn, pathwise
from textgym.agents.common.replay_agent import Behaviour, ReplayAgent
from textgym.agents.common.replay_buffer import ReplayBatch, ReplayBuffer
from textgym.agents.common.rollout import collect
from textgym.games.game_env import GameVectorEnv
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions import log_probs
from textgym.models.sequences import Sequences
from textgym.rewards.kl import AdaptiveKL
from textgym.rewards.reference import SyncReference
from textgym.testing import (
    ExactTask,
    Measured,
    assert_close,
    assert_learns,
    byte_tokenizer,
    mock_lm,
    terms_of,
    tolerance,
)

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

TASK = ExactTask(vocab_size=5, horizon=3, seed=2)
FAST = {"episodes_per_update": 32, "learning_starts": 32, "exploration_temperature": 4.0, "epsilon_end": 0.5}
GREEDY = {**FAST, "backup": "greedy"}
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "soft": (DQN, {**FAST, "n_steps": 3}),
    "greedy": (DQN, GREEDY),
    "double": (DQN, {**GREEDY, "double": True}),
    "not dueling": (DQN, {**GREEDY, "dueling": False}),
    "n steps": (DQN, {**GREEDY, "n_steps": 3}),
    "noisy": (DQN, {**GREEDY, "noisy": True}),
    "quantiles": (DQN, {**GREEDY, "n_quantiles": 4}),
    "prioritised": (DQN, {**GREEDY, "prioritised": True}),
    "everything": (DQN, {**GREEDY, "prioritised": True, "n_quantiles": 4, "noisy": True, "double": True}),
    "pathwise": (Pathwise, {**FAST, "relaxation_temperature": 16.0, "anneal_learning_rate": False}),
    "pathwise, gumbel": (
        Pathwise,
        {**FAST, "relaxation_temperature": 16.0, "anneal_learning_rate": False, "relaxation": "gumbel"},
    ),
}


def make_envs(beta: Any = 0.0, **changes: Any) -> Any:
    return gym.make_vec("textgym/Text-v0", num_envs=32, kl_mode="deferred", **TASK.env_kwargs(beta) | changes)


def make_agent(name: str, envs: Any = None, **changes: Any) -> ReplayAgent:
    kind, settings = AGENTS[name]
    config = {"learning_rate": 0.05, "adam_epsilon": 1e-8, **settings, **changes}
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    beta = 0.3 if name == "soft" else 0.0
    return kind(policy, make_envs(beta) if envs is None else envs, kind.config_class(**config))


def texts(*chosen: int) -> Sequences:
    return TASK.sequences([TASK.texts[index] for index in chosen])


SMALL = ExactTask(vocab_size=5, horizon=2, seed=2)
BEST = SMALL.texts[int(SMALL.rewards.argmax())]


def learned(name: str, seed: int, updates: int, **changes: Any) -> ActorCritic:
    """An agent's policy after so many updates on the small task."""
    beta = 0.3 if name == "soft" else 0.0
    kind, settings = AGENTS[name]
    envs = gym.make_vec("textgym/Text-v0", num_envs=32, kl_mode="deferred", **SMALL.env_kwargs(beta))
    policy = ActorCritic.from_pretrained(SMALL.language_model(), critic="separate")
    config = {"learning_rate": 0.1, "adam_epsilon": 1e-8, "seed": seed, **settings, **changes}
    kind(policy, envs, kind.config_class(**config)).learn(32 * updates)
    return policy


def lead_of_best(policy: ActorCritic) -> float:
    """By how many nats each token of the best text is ahead of all others, at the step where that is least.

    Above 0 the greedy text is the best one.
    """
    with torch.no_grad():
        log_probs = policy.logits(SMALL.sequences([BEST]).states()).log_softmax(-1)  # (T, V)
    best = torch.nn.functional.one_hot(torch.tensor(BEST), SMALL.vocab_size).bool()
    return float((log_probs[best] - log_probs.masked_fill(best, -torch.inf).amax(1)).min())


GREEDY_LEADS = {
    "greedy": (25, Measured(mean=0.637, standard_deviation=0.020, runs=6)),
    "double": (25, Measured(mean=0.643, standard_deviation=0.020, runs=6)),
    "not dueling": (25, Measured(mean=0.635, standard_deviation=0.020, runs=6)),
    "n steps": (25, Measured(mean=0.640, standard_deviation=0.021, runs=6)),
    "noisy": (25, Measured(mean=0.755, standard_deviation=0.040, runs=6)),
    "quantiles": (25, Measured(mean=0.713, standard_deviation=0.048, runs=6)),
    "prioritised": (25, Measured(mean=0.659, standard_deviation=0.032, runs=6)),
    "everything": (50, Measured(mean=0.665, standard_deviation=0.006, runs=6)),
    "pathwise": (40, Measured(mean=6.19, standard_deviation=1.09, runs=12)),
    "pathwise, gumbel": (40, Measured(mean=6.19, standard_deviation=1.09, runs=12)),
}
"""Updates, and the lead of the best text after them."""


def usually(*names: str) -> list[Any]:
    """All agents that go by the greedy text, those with other names as slow tests: each takes seconds."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in GREEDY_LEADS]


@pytest.mark.slow
@pytest.mark.parametrize("name", usually("greedy"))
def test_the_greedy_text_is_the_best(name: str) -> None:
    """Q-values that are right lead by 0.65 nats, a policy by as much as it was trained."""
    updates, measured = GREEDY_LEADS[name]
    leads = [lead_of_best(learned(name, seed, updates)) for seed in range(2)]
    assert_learns(leads, at_least=1.0 if "pathwise" in name else 0.3, measured=measured)


@pytest.mark.slow
def test_the_soft_policy_is_the_closed_form() -> None:
    optimum = SMALL.optimum(0.3)
    gaps, nearness = [], []
    for seed in range(2):
        log_probs = SMALL.log_probs(learned("soft", seed, updates=50, max_grad_norm=100.0))
        gaps.append(optimum.gap_closed(log_probs))
        nearness.append(-float(np.abs(np.exp(log_probs) - optimum.probabilities).sum()))
    assert_learns(gaps, at_least=0.99, measured=Measured(mean=0.9999, standard_deviation=0.0001, runs=6))
    assert_learns(nearness, at_least=-0.1, measured=Measured(mean=-0.009, standard_deviation=0.007, runs=6))


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_without_a_learning_rate_or_with_flipped_rewards_the_best_text_is_not_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lead_of_best(learned(name, 0, 1, learning_rate=0.0)) == lead_of_best(ActorCritic(SMALL.language_model())) < 0
    score = SMALL.score
    monkeypatch.setattr(SMALL, "score", lambda completion_ids: [-reward for reward in score(completion_ids)])
    assert all(lead_of_best(learned(name, seed, updates=25)) < 0 for seed in range(2))


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("name", ["soft", "everything", "pathwise"])
def test_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    beta = 0.3 if name == "soft" else 0.0
    whole = make_agent(name, buffer_size=80).learn(160)
    part = make_agent(name, buffer_size=80)
    part.learn(160, [lambda agent, _: agent.updates < 3])
    part.save(tmp_path / "agent")
    resumed = type(part).load(tmp_path / "agent", envs=make_envs(beta)).learn(160)
    assert resumed.updates == whole.updates == 5
    for mine, other in ((resumed.policy, whole.policy), (resumed.further, whole.further)):
        for (key, actual), expected in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(actual, expected), key


@pytest.mark.bit_for_bit
@pytest.mark.parametrize(
    "name", ["soft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("everything", "pathwise"))]
)
def test_lora_trains_and_resumes_the_adapter_alone(name: str, tmp_path: Path) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    kind, settings = AGENTS[name]
    arguments = TASK.env_kwargs(0.3 if name == "soft" else 0.0) | {"reference": mock_lm(TASK.vocab_size)}

    def make() -> ReplayAgent:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            policy = ActorCritic.from_pretrained(mock_lm(TASK.vocab_size), lora=lora)
        envs = gym.make_vec("textgym/Text-v0", num_envs=32, kl_mode="deferred", **arguments)
        return kind(policy, envs, kind.config_class(learning_rate=0.01, **settings))

    start = {key: weight.clone() for key, weight in make().policy.state_dict().items()}
    whole, part = make().learn(160), make()
    part.learn(160, [lambda agent, _: agent.updates < 3])
    part.save(tmp_path / "agent")
    envs = gym.make_vec("textgym/Text-v0", num_envs=32, kl_mode="deferred", **arguments)
    resumed = type(part).load(tmp_path / "agent", envs=envs).learn(160)
    for (key, expected), actual in zip(
        whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), key
        assert "lora_B" not in key or not torch.equal(expected, start[key]), key
        assert "lora" in key or "value_head" in key or torch.equal(expected, start[key]), key


@pytest.mark.parametrize("name", ["greedy", "pathwise"])
def test_a_moving_reference_is_refused(name: str) -> None:
    """The replay buffer holds log-probs of the reference as it was."""
    agent = make_agent(name)
    agent.collect = lambda: pytest.fail("before the first rollout")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="leave SyncReference out, or use an on-policy agent"):
        agent.learn(64, [SyncReference(every=4)])


def test_the_weights_of_priorities_correct_them_completely_in_the_last_update() -> None:
    """Also if that is smaller than the others, or if the run was made longer."""
    agent = make_agent("prioritised", priority_correction=0.2, gradient_steps=1)
    exponents: list[float] = []
    sample = agent.memory.sample
    agent.memory.sample = lambda *args: exponents.append(agent.memory.beta) or sample(*args)  # type: ignore[func-returns-value, method-assign]
    agent.learn(3 * 32)
    assert exponents == pytest.approx([0.2, 0.6, 1.0])
    agent.learn(4 * 32 + 4)
    assert exponents[3:] == pytest.approx([0.2 + 0.8 * 96 / 100, 1.0])


class Rounds:
    """Three turns, which pay 1, 2 and 4; the replies have different lengths."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return "q" * (1 + seed % 2), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return "R" * (1 + len(action)), float(2 ** (self.turn - 1)), self.turn == 3, False, {}


def game_agent(name: str, **changes: Any) -> Any:
    kind, settings = AGENTS[name]
    stops = list(range(0, 256, 3))  # so that turns end early
    envs = GameVectorEnv(
        8,
        Rounds,
        byte_tokenizer(),
        num_games=8,
        max_prompt_tokens=4,
        max_new_tokens=16,
        stop=stops,
        kl_coef=0.1 if name == "soft" else 0.0,
    )
    policy = ActorCritic.from_pretrained(mock_lm(num_layers=1), critic="separate")
    sizes = {"episodes_per_update": 8, "learning_starts": 8, "batch_size": 8, "gradient_steps": 2}
    return kind(policy, envs, kind.config_class(**{**settings, **sizes, **changes}))


@pytest.mark.parametrize("name", ["soft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("greedy", "pathwise"))])
def test_replayed_games_have_the_steps_of_the_agent_alone(name: str) -> None:
    """Their n-step targets are those of the tokens of the agent, put together without the replies."""
    agent = game_agent(name, n_steps=2, gamma=0.5)
    rollout = agent.play()
    agent.remember(rollout, agent.measure_kl(rollout))
    batch = agent.memory.sample(8, torch.Generator().manual_seed(0))
    mask = batch.sequences.response_mask
    lengths = torch.arange(mask.shape[1]) < batch.sequences.response_lengths[:, None]
    assert (lengths & ~mask).any(), "replies"
    assert (batch.rewards[~mask] == 0).all()
    assert set(batch.rewards.unique().tolist()) >= {0.0, 1.0, 2.0}, "each turn has its reward"

    calls: list[tuple[Any, ...]] = []
    module = pathwise if name == "pathwise" else dqn
    original = module.n_step_returns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "n_step_returns", lambda *a: calls.append(a) or original(*a))
        loss, errors, _ = agent.loss(batch)
    assert loss.isfinite()
    assert (errors[~mask] == 0).all()
    assert calls, "the loss has n-step returns"
    for rewards, values, given, gamma, n, *best in calls:
        assert torch.equal(given, mask)
        found = original(rewards, values, given, gamma, n, *best)
        for row in range(8):
            own = mask[row]
            r, v = rewards[row][own].tolist(), [*values[row][own].tolist(), 0.0, 0.0]
            stays = [*best[0][row][own].tolist(), True] if best else [True] * (len(r) + 1)
            for t, value in enumerate(found[row][own].tolist()):
                two = t + 1 < len(r) and stays[t + 1]
                expected = r[t] + 0.5 * (r[t + 1] + 0.5 * v[t + 2] if two else v[t + 1])
                assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["soft", pytest.param("prioritised", marks=pytest.mark.slow)])
def test_a_replay_agent_learns_from_games_and_micro_batches_change_nothing(name: str) -> None:
    """The shares of micro-batches are those of the agent's tokens, of which the losses are means."""
    start, *weights = (
        torch.cat([weight.detach().flatten() for weight in agent.policy.parameters()])
        for agent in (
            game_agent(name),
            game_agent(name, optimizer="SGD", learning_rate=0.1, gradient_steps=1).learn(8),
            game_agent(name, optimizer="SGD", learning_rate=0.1, gradient_steps=1, micro_batch_size=3).learn(8),
        )
    )
    assert_close(weights[1], weights[0], terms=FORWARD)
    assert (weights[0] - start).abs().max() > 1e-3


def remember(memory: ReplayBuffer, *chosen: int) -> None:
    sequences = texts(*chosen)
    rewards = torch.tensor([[float(index)] for index in chosen]) * sequences.response_mask
    memory.add(sequences, rewards, -rewards, longest=TASK.horizon)


def actor(noise: float = 1.0) -> ActorCritic:
    policy = ActorCritic.from_pretrained(TASK.language_model(), critic="separate")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        policy.lm.model.logits.weight += noise * torch.randn(policy.lm.model.logits.weight.shape, generator=generator)
        policy.value_head.weight.normal_(generator=generator)
    return policy


# --- targets by hand ---


def batch_of(agent: ReplayAgent, *chosen: int) -> ReplayBatch:
    sequences = texts(*chosen)
    rewards = torch.where(sequences.response_mask, torch.arange(1.0, 1 + TASK.horizon), 0.0)
    reference = agent.penalty.reference.sequence_log_probs(sequences)
    ones = torch.ones(len(chosen))
    return ReplayBatch(sequences, rewards, reference, ones, torch.arange(len(chosen)))


@pytest.mark.parametrize("double", [False, True])
def test_greedy_targets(double: bool) -> None:
    agent = make_agent("greedy", double=double, gamma=0.9)
    assert isinstance(agent, DQN)
    with torch.no_grad():  # a network that has moved away from its target
        noise = torch.randn(agent.policy.lm.model.logits.weight.shape, generator=torch.Generator().manual_seed(0))
        agent.policy.lm.model.logits.weight += noise
    batch = batch_of(agent, 60, 80)
    assert batch.sequences.response_lengths.tolist() == [3, 3]
    q, targets = agent._greedy_q_and_targets(batch)
    states = batch.sequences.states()
    online, target = (lm.logits(states).log_softmax(-1).view(2, 3, -1) for lm in (agent.policy, agent.target.actor))
    values = target.gather(2, online.argmax(-1, keepdim=True))[..., 0] if double else target.amax(-1)
    expected = batch.rewards + 0.9 * torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
    torch.testing.assert_close(targets[..., 0], expected)
    chosen = online.gather(2, batch.sequences.actions.view(2, 3, 1))[..., 0]
    torch.testing.assert_close(q[..., 0], chosen)


def test_greedy_targets_go_on_along_the_best_tokens_alone() -> None:
    agent = make_agent("n steps")
    assert isinstance(agent, DQN)
    batch = batch_of(agent, *range(5, 85, 7))
    with torch.no_grad():
        targets = agent._greedy_q_and_targets(batch)[1][..., 0]
        states = batch.sequences.states()
        q = agent.target.actor.logits(states).log_softmax(-1)
    greedy = batch.sequences.pad(q.argmax(-1) == batch.sequences.actions)
    value = batch.sequences.pad(q.amax(-1))
    for row, length in enumerate(batch.sequences.response_lengths.tolist()):
        for t in range(length):
            expected, step = float(batch.rewards[row, t]), t + 1
            while step < length and greedy[row, step]:
                expected, step = expected + float(batch.rewards[row, step]), step + 1
            expected += float(value[row, step]) if step < length else 0.0
            assert float(targets[row, t]) == pytest.approx(expected, abs=ROUNDING)
    assert greedy[:, 1:].any()
    assert not greedy.all()


def test_soft_targets_hold_along_any_text() -> None:
    """At the optimum Q equals its target for every number of steps, whoever wrote the text."""
    beta, optimum = 0.3, TASK.optimum(0.3)
    agent = make_agent("soft")
    assert isinstance(agent, DQN)
    # The best policy and its values, by going through the tree of texts from the end.
    best = {text: float(optimum.log_reference[i] * beta + optimum.rewards[i]) for text, i in TASK.index.items()}
    prefixes = {text[:n] for text in TASK.texts for n in range(len(text))}
    log_reference = {text: float(optimum.log_reference[i]) for text, i in TASK.index.items()}

    def mass(prefix: tuple[int, ...], table: dict[tuple[int, ...], float], scale: float) -> float:
        inside = [value / scale for text, value in table.items() if text[: len(prefix)] == prefix]
        return scale * float(torch.tensor(inside, dtype=torch.float64).logsumexp(0))

    values = {prefix: mass(prefix, best, beta) - beta * mass(prefix, log_reference, 1.0) for prefix in prefixes}
    policy = {prefix: mass(prefix, best, beta) / beta for prefix in prefixes | set(TASK.texts)}
    rewards = torch.zeros(3, TASK.horizon)
    batch = batch_of(agent, 30, 60, 80)
    chosen = [TASK.texts[i] for i in (30, 60, 80)]
    for row, text in enumerate(chosen):
        rewards[row, len(text) - 1] = float(TASK.rewards[TASK.index[text]])
    value = torch.tensor([[values[text[:t]] for t in range(3)] for text in chosen])
    ratio = torch.tensor([[policy[text[: t + 1]] - policy[text[:t]] for t in range(3)] for text in chosen])
    added = beta * (ratio - batch.reference_log_probs)
    agent.soft.of_actions = agent.soft_target.of_actions = lambda *_: (value, added)  # type: ignore[method-assign]
    for n_steps in (1, 2, 3):
        agent.config.n_steps = n_steps
        q, targets = agent._soft_q_and_targets(batch._replace(rewards=rewards))
        assert_close(q, targets, terms=FORWARD)


def test_greedy_backups_pay_what_an_environment_of_kl_mode_reference_pays() -> None:
    free, priced = (make_agent("greedy", make_envs(beta)) for beta in (0.0, 0.3))
    assert isinstance(free, DQN)
    assert isinstance(priced, DQN)
    batch = batch_of(free, 60, 80)
    extra = priced._greedy_q_and_targets(batch)[1] - free._greedy_q_and_targets(batch)[1]
    torch.testing.assert_close(extra[..., 0], 0.3 * batch.reference_log_probs)


def test_targets_follow() -> None:
    agent = make_agent("greedy", tau=0.25, target_update_interval=2, learning_rate=0.1)
    (target, followed), *_ = agent.follow()
    before = [weight.clone() for weight in target.parameters()]
    rollout = agent.play()
    agent.remember(rollout, agent.measure_kl(rollout))

    def step() -> None:
        agent.step(agent.memory.sample(agent.config.batch_size, agent.shuffler))
        agent.update_targets()

    step()
    assert all(torch.equal(old, new) for old, new in zip(before, target.parameters(), strict=True))
    step()
    for old, new, online in zip(before, target.parameters(), followed.parameters(), strict=True):
        torch.testing.assert_close(new.data, old + 0.25 * (online.data - old))


# --- exploration ---


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.0])
def test_behaviour_log_probs_are_those_of_the_mixture(greedy: bool, epsilon: float) -> None:
    policy, reference = actor(), actor(noise=0.0)
    envs = make_envs()
    envs.unwrapped.array = "torch"
    agent = make_agent("greedy", envs)  # takes the environment over
    player: Any = Behaviour(policy, reference, epsilon, 2.0, greedy)
    rollout = collect(agent.envs, player)
    states = rollout.sequences.states()
    own = policy.logits(states).softmax(-1)
    if greedy:
        own = torch.nn.functional.one_hot(own.argmax(-1), TASK.vocab_size).float()
    mixed = (1 - epsilon) * own + epsilon * (reference.logits(states) / 2.0).softmax(-1)
    expected = mixed.gather(1, rollout.sequences.actions[:, None])[:, 0].log()
    assert_close(rollout.log_probs[rollout.response_mask], expected.detach(), terms=FORWARD)


def test_epsilon_falls() -> None:
    history: list[float] = []
    agent = make_agent("greedy", epsilon_start=0.8, epsilon_end=0.2, epsilon_fraction=0.5)
    agent.learn(320, [lambda _, metrics: history.append(metrics["val/epsilon"])])
    assert history[0] == 0.8
    assert history[1] == pytest.approx(0.8 - 0.6 * 0.2)
    assert history[5:] == pytest.approx([0.2] * 5)


# --- the loss ---


def test_quantile_loss_by_hand() -> None:
    """Quantile k of K is pulled up by k + 1/2 parts in K and down by the rest."""
    agent = make_agent("quantiles", n_quantiles=2)
    assert isinstance(agent, DQN)
    batch = batch_of(agent, 60)
    q = torch.tensor([0.0, 0.5]).expand(1, 3, 2).clone().requires_grad_()
    targets = torch.tensor([0.2, 3.0]).expand(1, 3, 2)
    agent._greedy_q_and_targets = lambda _: (q, targets)  # type: ignore[method-assign]
    loss, _, _ = agent.loss(batch)

    def huber(error: float) -> float:
        return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5

    # Quantiles at 1/4 and 3/4; a mean over targets, a sum over quantiles.
    low = (0.25 * huber(0.2) + 0.25 * huber(3.0)) / 2
    high = (0.25 * huber(-0.3) + 0.75 * huber(2.5)) / 2
    assert float(loss.detach()) == pytest.approx(low + high)


def test_metrics_of_q_are_means_over_the_response_tokens_and_quantiles() -> None:
    agent = make_agent("quantiles", n_quantiles=2)
    assert isinstance(agent, DQN)
    batch = batch_of(agent, min(TASK.index.values(), key=lambda index: len(TASK.texts[index])), 60)
    mask = batch.sequences.response_mask
    assert not mask.all()
    q = torch.where(mask, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 99.0)
    agent._greedy_q_and_targets = lambda _: (torch.stack([q - 1, q + 1], -1), torch.stack([q, q], -1) + 0.5)  # type: ignore[method-assign]
    _, errors, metrics = agent.loss(batch)
    torch.testing.assert_close(errors, torch.full((2, 3), 0.5))
    assert float(metrics["val/q_avg"]) == pytest.approx(float(q[mask].mean()))
    assert float(metrics["val/td_error_avg"]) == pytest.approx(0.5)


def test_weights_belong_to_episodes() -> None:
    agent = make_agent("greedy")
    batch = batch_of(agent, 60, 80)
    alone = agent.loss(batch.part(slice(0, 1)))[0]
    weighted = agent.loss(batch._replace(weights=torch.tensor([1.0, 0.0])))[0]
    torch.testing.assert_close(weighted, alone / 2)  # both have three tokens
    assert alone > 0


@pytest.mark.parametrize("name", AGENTS)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are made again in the backward pass, with the noise that there was."""
    gradients = []
    for elements in (2**22, 3 * TASK.vocab_size):
        monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", elements)
        agent = make_agent(name)
        if isinstance(agent, Pathwise):  # whose relaxation draws noise for each chunk
            monkeypatch.setattr("textgym.agents.pathwise.relax", lambda log_probs, seed, config: log_probs.exp())
        loss, _, _ = agent.loss(batch_of(agent, 30, 60, 80))
        agent.optimizer.zero_grad()
        loss.backward()
        agent.apply_gradients(torch.zeros(()))
        gradients.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert_close(gradients[1], gradients[0], terms=FORWARD, scale=1.0)


@pytest.mark.parametrize("name", ["soft", "greedy", "quantiles", "pathwise"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(name: str) -> None:
    gradients = []
    for micro_batch_size in (None, 5):
        agent = make_agent(name, micro_batch_size=micro_batch_size, max_grad_norm=1e9)
        remember(agent.memory, 0, 5, 30, 60, 80)
        if isinstance(agent, Pathwise):  # whose relaxation draws noise for each pass
            agent.values = functools.partial(_without_noise, agent.values)  # type: ignore[method-assign]
        agent.step(agent.memory.sample(agent.config.batch_size, agent.shuffler))
        gradients.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert_close(gradients[1], gradients[0], terms=FORWARD, scale=1.0)


def _without_noise(values: Any, *arguments: Any) -> Any:
    return values(*arguments[:4])


FALLS = {  # of the logarithm of the error
    "soft": Measured(mean=0.700, standard_deviation=0.078, runs=12),
    "everything": Measured(mean=0.997, standard_deviation=0.127, runs=12),
    "pathwise": Measured(mean=1.486, standard_deviation=0.156, runs=12),
}


def fall_of_errors(name: str, seed: int, **changes: Any) -> float:
    """By how many nats errors of the Q-function fall from the first three updates to the last three."""
    kind, settings = AGENTS[name]
    envs = make_envs(0.3, min_new_tokens=2)
    policy = ActorCritic.from_pretrained(TASK.language_model(), temperature=0.7)
    config = {"learning_rate": 0.05, "seed": seed, **settings, **changes}
    history: list[dict[str, float]] = []
    kind(policy, envs, kind.config_class(**config)).learn(32 * 20, [lambda _, metrics: history.append(metrics)])
    assert all(np.isfinite(list(metrics.values())).all() for metrics in history)
    assert history[-1]["val/response_tokens"] >= 2
    errors = [metrics["val/td_error_avg"] for metrics in history[1:]]
    return float(np.log(np.mean(errors[:3]) / np.mean(errors[-3:])))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "soft" else pytest.mark.slow) for name in FALLS]
)
def test_trains_with_a_shared_critic_a_minimum_and_another_temperature(name: str) -> None:
    assert_learns([fall_of_errors(name, seed) for seed in range(2)], at_least=0.35, measured=FALLS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FALLS)
def test_errors_do_not_fall_without_a_learning_rate(name: str) -> None:
    assert np.mean([fall_of_errors(name, seed, learning_rate=0.0) for seed in range(2)]) < 0.35


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DQNConfig(double=True), "double=True cannot be used with backup='soft'"),
        (lambda: DQNConfig(n_steps=0), "n_steps must be at least 1"),
        (lambda: DQNConfig(backup="greedy", n_quantiles=0), "n_quantiles must be at least 1"),
        (lambda: DQNConfig(tau=0.0), "tau must be above 0"),
        (lambda: DQNConfig(epsilon_end=1.5), "epsilon_end must be from 0 to 1"),
        (lambda: DQNConfig(exploration_temperature=0.0), "exploration_temperature must be above 0"),
        (lambda: PathwiseConfig(relaxation_temperature=0.0), "relaxation_temperature must be above 0"),
        (lambda: make_agent("soft", make_envs(0.0)), "give the environment a kl_coef"),
        (lambda: make_agent("soft", make_envs(AdaptiveKL(6.0))), "depend on beta, so it must be constant"),
        (lambda: make_agent("soft", make_envs(0.3, kl_estimator="k3")), "use kl_estimator='k1'"),
        (lambda: make_agent("soft", make_envs(0.3, kl_clamp=1.0)), "kl_clamp=None"),
        (lambda: remember(ReplayBuffer(capacity=1), 1, 2), "set buffer_size to at least"),
    ],
)
def test_bad_settings_are_explained(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
