"""Traps with every speed-up on: checkpointed layers, micro-batches, packing, chunks, captured steps, LoRA, bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import VectorWrapper
from torch import Tensor

from textgym import TextEnv
from textgym.agents import PPO, PPOConfig
from textgym.agents.common.rollout import Rollout
from textgym.games.game_env import GameVectorEnv
from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.decoding import generation
from textgym.models.distributions import log_probs
from textgym.rewards.kl import ESTIMATORS
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
LOG_PROB = 8.0  # the size of the mock model's log-probs
ROUNDING = tolerance(FORWARD, scale=LOG_PROB)

ROWS, BETA = 8, 0.3
KINDS = ["shared", "separate", "lora", "lora, separate"]
each_kind = pytest.mark.parametrize("kind", KINDS)
far_kinds = pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:-1]), KINDS[-1]]
)
unlike_kinds = pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[-1], marks=pytest.mark.slow)])
ENV: dict[str, Any] = {
    "prompts": ["one", "three", "a longer prompt", "x"],
    "tokenizer": byte_tokenizer(),
    "stop": list(range(0, 256, 8)),  # so that lengths differ
    "max_prompt_tokens": 8,
    "max_new_tokens": 8,
    "min_new_tokens": 2,
    "kl_coef": BETA,
}


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 5 * 258)
    monkeypatch.setattr(generation, "LOGIT_ELEMENTS", 5 * 258)


def make_policy(kind: str, moved: bool = True, **changes: Any) -> ActorCritic:
    """A policy that its reference is not; where it has not `moved`, one that is as it was loaded."""
    lora = None
    if "lora" in kind:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=not moved)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # peft draws from torch's global generator
        critic = "separate" if "separate" in kind else "shared"
        policy = ActorCritic.from_pretrained(mock_lm(), critic, temperature=0.8, lora=lora, **changes)
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
    return policy


def make_envs(kind: str = "shared", **changes: Any) -> Any:
    reference = mock_lm() if "lora" in kind else mock_lm(seed=5)  # the policy without its adapter, or another one
    settings = {**ENV, "reward": vowels, "reference": reference, "kl_mode": "deferred", **changes}
    return gym.make_vec("textgym/Text-v0", num_envs=ROWS, **settings)


def make_agent(kind: str, envs: Any = None, policy: ActorCritic | None = None, **changes: Any) -> PPO:
    settings = {
        "episodes_per_update": ROWS,
        "minibatch_size": None,
        "num_epochs": 1,
        "micro_batch_size": 3,
        "gradient_checkpointing": True,
        "entropy_coef": 0.1,
        "value_coef": 0.5,
        "max_grad_norm": 1e9,
        "learning_rate": 0.0,
        **changes,
    }
    return PPO(policy or make_policy(kind), envs or make_envs(kind), PPOConfig(**settings))


def rollouts_of(agent: PPO) -> list[Rollout]:
    """Those that it is going to collect."""
    rollouts: list[Rollout] = []
    own = agent.collect
    agent.collect = lambda: rollouts.append(own()) or rollouts[-1]  # type: ignore[method-assign, func-returns-value]
    return rollouts


def ratios_of(agent: PPO) -> list[Tensor]:
    """log pi - log pi_old of the real tokens of every pass that it is going to make."""
    ratios: list[Tensor] = []
    loss = agent.loss

    def noted(new: Evaluation, batch: Any) -> Any:
        assert new.log_prob.dtype == new.value.dtype == new.entropy.dtype == torch.float32
        ratios.append((new.log_prob - batch.log_probs)[batch.response_mask].detach())
        value = loss(new, batch)
        assert value[0].dtype == torch.float32
        return value

    agent.loss = noted  # type: ignore[method-assign]
    return ratios


def advantages_of(agent: PPO, rollout: Rollout, kl: Tensor) -> Tensor:
    """Those `(N, T)` that an update would learn from; nothing is learned."""
    seen: list[Tensor] = []
    agent.minibatches = lambda rollout, advantages, returns: seen.append(advantages) or iter(())  # type: ignore[method-assign, assignment, func-returns-value]
    agent.update(rollout, kl)
    return seen[0]


def gradients_of(agent: PPO) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in agent.policy.named_parameters() if weight.grad is not None}


# --- an update, by its definition ---


def plain_loss(agent: PPO, rollout: Rollout, plainly: Callable[..., Evaluation]) -> Tensor:
    """PPO's loss before its first step: equations over single sequences, one token after the other."""
    config, mask, coef = agent.config, rollout.response_mask, agent.penalty.coef
    new = plainly(agent.policy, rollout.sequences)
    old, values = new.log_prob.detach(), new.value.detach()
    assert_close(rollout.log_probs, old, terms=FORWARD)
    assert_close(rollout.values, values, terms=FORWARD)
    with torch.no_grad():
        rewards = coef * (plainly(agent.penalty.reference, rollout.sequences).log_prob - old)
    assert rewards[mask].abs().max() > 0.01, "a policy that has moved"
    rewards = rewards + rollout.rewards
    advantages, to_go = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, own in enumerate(mask):
        steps = own.nonzero()[:, 0].tolist()
        after = [*steps[1:], None]
        errors = [
            rewards[row, t] + (0.0 if n is None else config.gamma * values[row, n]) - values[row, t]
            for t, n in zip(steps, after, strict=True)
        ]
        for place, t in enumerate(steps):
            advantages[row, t] = sum((config.gamma * config.lam) ** k * error for k, error in enumerate(errors[place:]))
            to_go[row, t] = sum(config.gamma**k * rewards[row, s] for k, s in enumerate(steps[place:]))
    returns = (advantages + values)[mask]
    whitened = (advantages[mask] - advantages[mask].mean()) / advantages[mask].std(correction=0)
    policy = -((new.log_prob[mask] - old[mask]).exp() * whitened).mean()
    std = to_go[mask].std(correction=0)  # unit of the value loss
    value = 0.5 * ((new.value[mask] - returns) / std).square().mean()
    return policy + config.value_coef * value - config.entropy_coef * new.entropy[mask].mean()


def assert_gradient_is_plain(agent: PPO, plainly: Callable[..., Evaluation]) -> None:
    rollouts = rollouts_of(agent)
    agent.learn(ROWS)
    found = {name: gradient.clone() for name, gradient in gradients_of(agent).items()}
    agent.policy.zero_grad()
    plain_loss(agent, rollouts[0], plainly).backward()
    expected = gradients_of(agent)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-5, f"{name}: nothing to compare"
        scale = max(1.0, float(gradient.norm()))
        assert_close(found[name] / scale, gradient / scale, terms=FORWARD, scale=1.0)


@far_kinds
def test_the_gradient_of_an_update_is_that_of_the_plain_path(kind: str, plainly: Any, captures: list[Any]) -> None:
    agent = make_agent(kind)
    assert_gradient_is_plain(agent, plainly)
    assert captures, "responses were written in captured steps"


# --- what no option may change ---


@pytest.mark.parametrize("bf16", [False, True])
@far_kinds
def test_ratio_is_one_before_the_first_update(kind: str, bf16: bool, request: pytest.FixtureRequest) -> None:
    """In bfloat16 it is in the band that PPOConfig.bf16 states."""
    captured = request.getfixturevalue("captures") if kind == "lora, separate" and not bf16 else None
    agent = make_agent(kind, minibatch_size=4, num_epochs=2, bf16=bf16)
    ratios = ratios_of(agent)
    history: list[dict[str, float]] = []
    agent.learn(2 * ROWS, [lambda _, metrics: history.append(metrics)])
    assert len(ratios) == 2 * 2 * 2 * 2, "updates, epochs, minibatches and micro-batches"
    assert torch.cat(ratios).abs().max() < (0.5 if bf16 else ROUNDING)
    assert (torch.cat(ratios).abs().mean() > 1e-4) == bf16
    assert all(metrics["val/ratio"] == pytest.approx(1.0, abs=0.02 if bf16 else ROUNDING) for metrics in history)
    assert bf16 or all(metrics["policy/clipfrac_avg"] == 0.0 for metrics in history)
    assert captured != []


@unlike_kinds
def test_with_weights_in_bf16(kind: str) -> None:
    """In the band that ActorCritic.from_pretrained states."""
    agent = make_agent(kind, policy=make_policy(kind, dtype=torch.bfloat16), minibatch_size=4, num_epochs=2)
    assert agent.policy.lm.dtype == torch.bfloat16
    ratios = ratios_of(agent)
    agent.learn(ROWS)
    assert torch.cat(ratios).abs().mean() < 0.03
    assert torch.cat(ratios).abs().max() < 0.5


@pytest.mark.parametrize("bf16", [False, True])
@unlike_kinds
def test_kl_is_zero_at_step_zero(kind: str, bf16: bool) -> None:
    agent = make_agent(kind, make_envs(reference=None), make_policy(kind, moved=False), bf16=bf16)
    rollout = agent.play()
    for estimator in ESTIMATORS:
        agent.penalty.estimator = estimator
        assert agent.measure_kl(rollout).abs().max() < ROUNDING, estimator


@unlike_kinds
def test_log_probs_and_losses_are_float32_and_in_the_band_of_bf16(kind: str, plainly: Any) -> None:
    """`ratios_of` looks at the dtypes."""
    agent = make_agent(kind, bf16=True)
    ratios, rollouts = ratios_of(agent), rollouts_of(agent)
    agent.learn(ROWS)
    moved = gradients_of(agent)
    agent.policy.zero_grad()
    plain_loss(agent, rollouts[0], plainly).backward()
    exact = gradients_of(agent)
    assert 1e-4 < torch.cat(ratios).abs().mean() < 0.03
    assert all(moved[name].dtype == torch.float32 for name in moved)
    distance = sum(float((moved[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    assert 0 < distance < 0.05 * sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5


@unlike_kinds
def test_a_row_alone_and_in_a_batch(kind: str) -> None:
    """Written, scored and differentiated."""
    agent = make_agent(kind)
    agent.envs.reset(options={"prompt_index": [0, 1, 2, 3, 2, 1, 0, 3]})
    observation = agent.base_env.current_observation()
    ids, lengths = observation["input_ids"], observation["attention_mask"].sum(1)
    settings = agent.base_env.max_new_tokens, agent.base_env.stop, True
    together = agent.policy.generate(ids, lengths, *settings)
    for row in range(ROWS):
        alone = agent.policy.generate(ids[row : row + 1], lengths[row : row + 1], *settings)
        end = int(alone.lengths[0])
        assert end == together.lengths[row]
        assert alone.tokens[0, :end].tolist() == together.tokens[row, :end].tolist()
        assert_close(alone.log_probs[0, :end], together.log_probs[row, :end], terms=FORWARD)

    sequences = agent.play().sequences
    agent.policy.evaluate(sequences, entropy_gradient=True).log_prob.sum().backward()
    expected = {name: gradient.clone() for name, gradient in gradients_of(agent).items()}
    agent.policy.zero_grad()
    whole = agent.policy.evaluate(sequences)
    for row in range(ROWS):
        one = agent.policy.evaluate(sequences[row : row + 1], entropy_gradient=True)
        for name in ("log_prob", "value", "entropy"):
            mine, other = getattr(one, name)[0], getattr(whole, name)[row]
            assert_close(mine, other[: len(mine)], terms=FORWARD)
        one.log_prob.sum().backward()
    for name, gradient in gradients_of(agent).items():
        scale = max(1.0, float(gradient.norm()))
        assert_close(gradient / scale, expected[name] / scale, terms=FORWARD, scale=1.0)


@unlike_kinds
def test_micro_batches_give_the_gradient_of_the_batch(kind: str) -> None:
    gradients = []
    for size in (None, 1, 3):
        agent = make_agent(kind, micro_batch_size=size)
        rollouts = rollouts_of(agent)
        agent.learn(ROWS)
        gradients.append(gradients_of(agent))
    assert len({*rollouts[0].sequences.response_lengths.tolist()}) > 2, "unequal lengths"
    for name, whole in gradients[0].items():
        for parts in gradients[1:]:
            scale = max(1.0, float(whole.norm()))
            assert_close(parts[name] / scale, whole / scale, terms=FORWARD, scale=1.0)


@unlike_kinds
def test_gradient_clipping_acts(kind: str) -> None:
    """A loss that explodes: one step of norm `max_grad_norm`, and no weight moves further than the learning rate.

    A separate critic is clipped by itself.
    """
    envs = make_envs(kind, reward=lambda completions: [1e6 * len(text) for text in completions])
    options = {"whiten_advantages": False, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    options |= {"clip_range_value": None, "normalise_values": False}  # a scale would change the value head, too
    agent = make_agent(kind, envs, anneal_learning_rate=False, **options)
    before = {name: weight.detach().clone() for name, weight in agent.policy.named_parameters()}
    history: list[dict[str, float]] = []
    agent.learn(ROWS, [lambda _, metrics: history.append(metrics)])
    assert history[0]["val/grad_norm"] > 1e5
    for group in agent.optimizer.param_groups:
        norms = [weight.grad.norm() for weight in group["params"] if weight.grad is not None]
        assert torch.stack(norms).norm() == pytest.approx(0.5, rel=1e-3), group["part"]
    moved = max(float((weight - before[name]).detach().abs().max()) for name, weight in agent.policy.named_parameters())
    assert 1e-4 < moved < 1.01e-3


class Echo:
    """Three turns; the environment answers each with what it heard and a mark."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return f"{seed}?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return "<!>", float(len(action)), self.turn == 3, False, {}


@unlike_kinds
def test_tokens_of_the_environment_are_not_trained_on(kind: str, plainly: Any) -> None:
    """The gradient is the plain one of what the policy wrote alone."""
    settings = {name: value for name, value in ENV.items() if name != "prompts"}
    settings |= {"max_new_tokens": 24, "min_new_tokens": 0, "kl_mode": "deferred"}
    reference = mock_lm() if "lora" in kind else mock_lm(seed=5)
    agent = make_agent(kind, GameVectorEnv(ROWS, Echo, **settings, reference=reference))
    rollouts = rollouts_of(agent)
    assert_gradient_is_plain(agent, plainly)
    steps = torch.arange(rollouts[0].response_mask.shape[1])
    theirs = (steps < rollouts[0].sequences.response_lengths[:, None]) & ~rollouts[0].response_mask
    assert theirs.sum() > ROWS, "the environment wrote"


@pytest.mark.bit_for_bit
@pytest.mark.parametrize(("kind", "bf16"), [("separate", False), ("lora, separate", True)])
def test_resume_bit_for_bit(kind: str, bf16: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "separate":
        request.getfixturevalue("captures")  # which take long
    options = {"learning_rate": 1e-2, "minibatch_size": 4, "bf16": bf16}
    whole = make_agent(kind, **options).learn(3 * ROWS)
    part = make_agent(kind, **options)
    start = {name: weight.clone() for name, weight in part.policy.state_dict().items()}
    part.learn(3 * ROWS, [lambda agent, _: False])
    part.save(tmp_path / "agent")
    resumed = PPO.load(tmp_path / "agent", envs=make_envs(kind)).learn(3 * ROWS)
    assert resumed.config == whole.config
    assert resumed.updates == whole.updates == 3
    expected = whole.policy.state_dict()
    for name, weight in resumed.policy.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert any((expected[name] - start[name]).abs().max() > 1e-2 for name in expected)


@unlike_kinds
def test_slow_and_fast_paths_agree(kind: str, captures: list[Any]) -> None:
    """One set of episodes in captured steps, through a `TextVectorEnv` stepped by `act`, and through a `TextEnv`."""
    fast = make_agent(kind)
    slow = make_agent(kind, VectorWrapper(make_envs(kind)))  # a wrapper is stepped through
    rollouts = [agent.play() for agent in (fast, slow)]
    assert captures, "the first one was written in captured steps"
    written, stepped = rollouts
    sequences, mask = written.sequences, written.response_mask
    assert torch.equal(sequences.actions, stepped.sequences.actions)
    assert torch.equal(mask, stepped.response_mask)
    kl, rewards, advantages = [], [], []
    for agent, rollout in zip((fast, slow), rollouts, strict=True):
        kl.append(agent.measure_kl(rollout))
        rewards.append(agent.penalty.charge(rollout.rewards, kl[-1]))
        advantages.append(advantages_of(agent, rollout, kl[-1]))
    for name in ("log_probs", "values", "scores"):
        assert_close(getattr(written, name), getattr(stepped, name), terms=FORWARD)
    for mine, other in (kl, rewards, advantages):
        assert_close(mine, other, terms=FORWARD)

    policy, reference = fast.policy, fast.penalty.reference
    prompts = fast.envs.unwrapped.task.current.tolist()
    for row in range(ROWS):
        env = TextEnv(**{**ENV, "reward": vowels, "reference": reference, "kl_mode": "exact"})
        env.attach_policy(policy)
        observation, _ = env.reset(options={"prompt_index": prompts[row]})
        start = int(sequences.prompt_lengths[row])
        for step in range(int(sequences.response_lengths[row])):
            token = int(sequences.input_ids[row, start + step])
            log_prob = policy.log_prob(observation, token, env.action_masks())
            value = policy.value(observation)
            observation, reward, terminated, *_ = env.step(token)
            for single, column in ((log_prob, written.log_probs), (value, written.values), (reward, rewards[0])):
                found = torch.as_tensor(single).float().reshape(())
                assert_close(found, column[row, step], terms=FORWARD, scale=LOG_PROB)
        assert terminated
