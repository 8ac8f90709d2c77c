"""Descendants of GRPO: GSPO, CISPO, DAPO, GDPO, importance weights of another sampler, tokens with high entropy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import textgym.agents.grpo as grpo
from textgym.agents import GRPO, PPO, GRPOConfig, PPOConfig
from textgym.agents.common.policy_gradient import Batch
from textgym.agents.common.rollout import Rollout
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.sequences import Sequences
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

TRL = json.loads((Path(__file__).parent / "trl" / "group_losses.json").read_text())
NEW, OLD, ENTROPIES = (torch.tensor(TRL[name]) for name in ("new", "old", "entropies"))
LENGTHS = torch.tensor(TRL["lengths"])
ROUNDING = tolerance(terms_of(mock_lm()), scale=8.0)  # of the mock model's log-probs


# --- losses, against those of TRL 1.16 ---


def batch_of(advantages: Tensor) -> Batch:
    width = NEW.shape[1]
    sequences = Sequences(torch.zeros(4, 1 + width, dtype=torch.long), torch.ones_like(LENGTHS), LENGTHS)
    advantages = torch.where(sequences.response_mask, advantages, 0.0)
    return Batch(sequences, OLD, torch.zeros_like(OLD), advantages, torch.zeros_like(OLD), torch.arange(4))


def loss_of(config: GRPOConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of an agent that was made of what the loss needs alone, and the gradient of the log-probs."""
    agent = GRPO.__new__(GRPO)
    agent.config = config
    agent.reference_log_probs = None
    agent.base_env = SimpleNamespace(max_new_tokens=TRL["longest"])  # type: ignore[assignment]
    new = NEW.clone().requires_grad_()
    loss, _ = agent.loss(Evaluation(new, torch.zeros_like(NEW), torch.zeros_like(NEW)), batch)
    return loss.detach(), torch.autograd.grad(loss, new)[0]


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gspo", {"ratio": "sequence", "loss_type": "grpo", "clip_range_high": 0.28}),
        ("cispo", {"surrogate": "cispo", "clip_range_high": 0.28}),
        ("entropy", {"clip_range_high": 0.28}),
    ],
)
def test_losses_and_gradients_equal_those_of_trl(name: str, settings: dict[str, Any]) -> None:
    expected = next(variant for variant in TRL["variants"] if variant["name"] == name)
    advantages = torch.tensor(TRL["advantages"])[:, None].expand(4, NEW.shape[1])
    batch = batch_of(advantages)
    if name == "entropy":  # the mask of an update, of these entropies
        agent = GRPO.__new__(GRPO)
        agent.config = GRPOConfig(entropy_share=0.4)
        agent.policy = SimpleNamespace(score_sequences=lambda _: (None, ENTROPIES))  # type: ignore[assignment]
        kept = agent.high_entropy(SimpleNamespace(training_mask=batch.response_mask, sequences=None))  # type: ignore[arg-type]
        assert kept.sum() == 5, "0.4 of 13 tokens"
        batch = batch_of(torch.where(kept, advantages, 0.0))
    loss, gradient = loss_of(GRPOConfig(**settings), batch)
    assert loss.item() == pytest.approx(expected["loss"], abs=tolerance(NEW.numel()))
    assert_close(gradient, torch.tensor(expected["gradient"]), terms=NEW.numel(), scale=1.0)
    plain = loss_of(GRPOConfig(clip_range_high=0.28), batch_of(advantages))[1]
    assert (plain - gradient).abs().max() > 0.01, "another loss than GRPO's"


def test_cispo_drops_no_token() -> None:
    """Where PPO's clip has no gradient, CISPO has that of the policy, times the clipped ratio."""
    ratio = (NEW - OLD).exp()
    mask = torch.arange(NEW.shape[1]) < LENGTHS[:, None]
    batch = batch_of(torch.ones(4, NEW.shape[1]))
    _, clipped = loss_of(GRPOConfig(clip_range_high=0.1), batch)
    _, gradient = loss_of(GRPOConfig(clip_range_high=0.1, surrogate="cispo"), batch)
    beyond = mask & (ratio > 1.1)
    assert beyond.any()
    assert (clipped[beyond] == 0).all()
    assert_close(gradient[mask], (-ratio.clamp(max=1.1) / mask.sum())[mask], terms=4, scale=1.0)


# --- updates ---


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def make_agent(reward: Any = vowels, kind: Any = GRPO, env: dict[str, Any] | None = None, **config: Any) -> Any:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=16,
        prompts=["one", "three", "x"],
        tokenizer=byte_tokenizer(),
        reward=reward,
        stop=list(range(0, 256, 8)),  # so that lengths differ
        max_new_tokens=6,
        **{"kl_coef": 0.0, **(env or {})},
    )
    groups = {"group_size": 4} if kind is GRPO else {"minibatch_size": None}
    settings = {"episodes_per_update": 16, "learning_rate": 1e-3, **groups, **config}
    return kind(ActorCritic.from_pretrained(mock_lm()), envs, kind.config_class(**settings))


def advantages_of(agent: Any, rollout: Rollout) -> Tensor:
    """Those `(N, T)` that an update would learn from; nothing is learned."""
    seen: list[Any] = []
    agent.minibatches = lambda rollout, advantages, *_, **__: seen.append((rollout, advantages)) or iter(())
    agent.update(rollout, torch.zeros_like(rollout.log_probs))
    agent.trained_on = seen[0][0]
    advantages: Tensor = seen[0][1]
    return advantages


def test_overlong_responses_pay_in_the_last_tokens() -> None:
    """Of at most 6 tokens, 4 are free; the fifth costs half of the penalty and the sixth all of it."""
    agent = make_agent(
        lambda completions: [0.0] * len(completions), overlong_buffer=2, overlong_penalty=3.0, scale="none"
    )
    assert agent.overlong(torch.arange(1, 7)).tolist() == [0.0, 0.0, 0.0, 0.0, 1.5, 3.0]
    rollout = agent.play()
    lengths = rollout.sequences.response_lengths
    paid = agent.overlong(lengths).view(-1, 4)
    expected = (paid.mean(1, keepdim=True) - paid).flatten()
    assert expected.abs().max() > 0
    assert_close(advantages_of(agent, rollout)[:, 0], expected.float())


def by_prompt(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
    """All equal for one of the three prompts."""
    return [0.0 if prompt == "one" else float(sum(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def test_groups_whose_scores_are_equal_are_replaced() -> None:
    plain, dynamic = make_agent(by_prompt), make_agent(by_prompt, dynamic_sampling=4)
    assert plain.flat_groups(plain.play()).any()
    for _ in range(3):
        rollout = dynamic.play()
        assert len(rollout) == 16
        assert not dynamic.flat_groups(rollout).any()
        prompts = [
            tuple(row[:n])
            for row, n in zip(
                rollout.sequences.input_ids.tolist(), rollout.sequences.prompt_lengths.tolist(), strict=True
            )
        ]
        assert all(len(set(prompts[start : start + 4])) == 1 for start in range(0, 16, 4)), "groups stay together"


def test_some_groups_stay_if_all_scores_are_equal() -> None:
    rounds: list[int] = []
    agent = make_agent(lambda completions: rounds.append(1) or [1.0] * len(completions), dynamic_sampling=3)
    rounds.clear()
    assert len(agent.play()) == 16
    assert len(rounds) == 1 + 3


def length(completion_ids: list[list[int]]) -> list[float]:
    return [100.0 * len(ids) for ids in completion_ids]


def test_each_reward_function_has_its_own_unit() -> None:
    """GDPO, by hand: normalised in groups by functions, added with weights, then over all episodes."""
    agent = make_agent([vowels, length], env={"reward_weights": [2.0, -1.0]}, scale="each")
    rollout = agent.play()
    columns = [rollout.components[f"reward/{name}"].double().numpy().reshape(-1, 4) for name in ("vowels", "length")]
    parts = [
        (column - column.mean(1, keepdims=True)) / (column.std(1, ddof=1, keepdims=True) + 1e-4) for column in columns
    ]
    total = 2.0 * parts[0] - parts[1]
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    assert np.abs(expected).max() > 0.5
    assert_close(
        advantages_of(agent, rollout)[:, 0].double().numpy(), expected.flatten(), terms=16, dtype=torch.float32
    )


def normalised(column: np.ndarray) -> np.ndarray:
    """A column in groups of four, in the unit of each group."""
    groups = column.reshape(-1, 4)
    parts: np.ndarray = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    return parts


def test_costs_of_constraints_length_and_a_missing_end_are_rewards_with_a_unit_of_their_own() -> None:
    """By hand: their weights are the multiplier and the penalties, whatever the unit of the function is."""
    settings: dict[str, Any] = {"constraints": {"length": 1.0}, "overlong_buffer": 3, "overlong_penalty": 0.7}
    env = {"reward_weights": [1.0, 0.0], "missing_eos_penalty": 1.5}
    agent = make_agent([vowels, length], env=env, scale="each", constraint_learning_rate=1e-9, **settings)
    agent.constraints.multipliers["length"] = 2.0
    rollout = agent.play()
    lengths = rollout.sequences.response_lengths.double().numpy()
    unended = (~rollout.ended_by_stop).double().numpy()
    assert len(set(unended)) == 2
    total = (
        normalised(rollout.components["reward/vowels"].double().numpy())
        - 2.0 * normalised(100.0 * lengths)
        - 0.7 * normalised(np.maximum(0.0, lengths - 3) / 3)
        - 1.5 * normalised(unended)
    )
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    # The step of the multiplier, 1e-9 times a mean below 1,000, is below the rounding of float32.
    assert_close(
        advantages_of(agent, rollout)[:, 0].double().numpy(), expected.flatten(), terms=64, dtype=torch.float32
    )


def test_a_row_without_a_score_has_no_part_in_the_unit_of_any_function() -> None:
    """Such as one that another function failed at; the values of the others say nothing of it."""
    agent = make_agent([vowels, length], scale="each", overlong_buffer=3)
    rollout = agent.play()
    rollout.raw_scores[1] = torch.nan
    advantages = advantages_of(agent, rollout)
    rollout.components["reward/length"][1] = 1e6
    changed = advantages_of(agent, rollout)
    assert torch.equal(changed, advantages)
    assert (advantages[1] == 0).all()
    assert advantages[0].abs().max() > 0.1


class Doubled(gym.vector.VectorRewardWrapper):
    """Pays every score twice."""

    def rewards(self, rewards: Any) -> Any:
        return 2 * rewards


def test_a_wrapper_that_changes_scores_is_refused_where_functions_have_their_own_unit() -> None:
    plain = make_agent([vowels, length], scale="each")
    agent = GRPO(plain.policy, Doubled(plain.envs), plain.config)
    before = [weight.clone() for weight in agent.policy.parameters()]
    with pytest.raises(ConfigError, match="a wrapper changes scores, by"):
        agent.learn(16)
    assert all(map(torch.equal, before, agent.policy.parameters()))


class Rarely(Doubled):
    """Pays every score twice from the second rollout on."""

    calls = 0

    def rewards(self, rewards: Any) -> Any:
        self.calls += 1
        return rewards if self.calls <= 8 else super().rewards(rewards)


def test_a_changed_score_is_found_in_any_rollout() -> None:
    plain = make_agent([vowels, length], scale="each")
    agent = GRPO(plain.policy, Rarely(plain.envs), plain.config)
    with pytest.raises(ConfigError, match="a wrapper changes scores"):
        agent.learn(100 * agent.config.episodes_per_update)
    assert agent.updates > 0


def test_a_changed_score_of_another_process_stops_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would wait in a collective operation for a process that has ended."""
    agent = make_agent([vowels, length], scale="each")
    rollout = agent.play()
    assert float(agent.unknown_reward(rollout)) == 0
    monkeypatch.setattr(grpo, "sum_over_processes", lambda own: own + 0.5)
    assert float(agent.unknown_reward(rollout)) == 0.5


def test_a_reward_of_weight_zero_has_no_part_in_the_sum() -> None:
    agent = make_agent([vowels, length], env={"reward_weights": [2.0, 0.0]}, scale="each")
    assert [weight for _, weight in agent.all_rewards(agent.play())] == [2.0, -1.0]  # and a missing end


def test_equal_scores_have_no_advantage_beside_groups_that_differ() -> None:
    """Not even that of rounding, whose sign would depend on what else is in the rollout."""
    agent = make_agent([by_prompt, length], env={"reward_weights": [0.3, 0.0]}, scale="each")
    rollout = agent.play()
    flat = agent.flat_groups(rollout).repeat_interleave(4)
    assert flat.any()
    advantages = advantages_of(agent, rollout)
    assert (advantages[flat] == 0).all()
    assert advantages[~flat].abs().max() > 0.1


def test_the_unit_of_one_reward_function_does_not_hide_another() -> None:
    scaled = []
    for factor in (1.0, 1000.0):

        def longer(completion_ids: list[list[int]], factor: float = factor) -> list[float]:
            return [factor * len(ids) for ids in completion_ids]

        agent = make_agent([vowels, longer], scale="each")
        scaled.append(advantages_of(agent, agent.play()))
    assert_close(scaled[1], scaled[0], terms=16, scale=100.0)


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_a_sampler_with_other_log_probs_is_corrected(kind: Any) -> None:
    """The ratio is to the trainer's log-probs, and weights are pi_old / mu up to the cap."""
    plain, agent = make_agent(kind=kind), make_agent(kind=kind, importance_cap=1.5)
    rollout = agent.play()
    own = rollout.log_probs.clone()
    noise = torch.where(rollout.response_mask, torch.randn(own.shape, generator=torch.Generator().manual_seed(0)), 0.0)
    expected = advantages_of(plain, rollout) * (-noise).exp().clamp(max=1.5)
    rollout.log_probs.add_(noise)
    assert_close(advantages_of(agent, rollout), expected, terms=terms_of(mock_lm()), scale=8.0)
    assert_close(agent.trained_on.log_probs, own, terms=terms_of(mock_lm()), scale=8.0)
    metrics = agent.update(rollout, torch.zeros_like(own))
    assert metrics["sampling/logp_difference"] == pytest.approx(
        noise[rollout.response_mask].abs().mean().item(), abs=ROUNDING
    )


def test_of_our_own_sampler_no_token_is_corrected() -> None:
    agent = make_agent(importance_cap=2.0)
    rollout = agent.play()
    assert_close(
        advantages_of(agent, rollout), advantages_of(make_agent(), rollout), terms=terms_of(mock_lm()), scale=8.0
    )


def test_tokens_of_one_state_are_kept_together() -> None:
    """Their entropies differ by rounding, which depends on what else is in the batch."""
    entropies = 2.0 + torch.tensor([[1e-7, 0.0, -2e-7, 3e-7], [-1.0, -1.0, -1.0, -1.0]])
    agent = GRPO.__new__(GRPO)
    agent.config = GRPOConfig(entropy_share=0.25)
    agent.policy = SimpleNamespace(score_sequences=lambda _: (None, entropies))  # type: ignore[assignment]
    rollout: Any = SimpleNamespace(training_mask=torch.ones(2, 4, dtype=torch.bool), sequences=None)
    assert agent.high_entropy(rollout).tolist() == [[True] * 4, [False] * 4]


def test_the_share_of_tokens_with_high_entropy_is_trained_on() -> None:
    agent = make_agent(entropy_share=0.25, scale="none")
    rollout = agent.play()
    with torch.no_grad():
        entropy = agent.policy.evaluate(rollout.sequences).entropy
    advantages = advantages_of(agent, rollout)
    mask = rollout.response_mask & (advantages_of(make_agent(scale="none"), rollout) != 0)
    assert advantages[~rollout.response_mask].abs().max() == 0
    kept = mask & (advantages != 0)
    assert entropy[kept].min() >= entropy[mask & ~kept].max()
    share = float(agent.high_entropy(rollout).sum() / rollout.response_mask.sum())
    assert share == pytest.approx(0.25, abs=1 / float(rollout.response_mask.sum()))


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": "sequence", "loss_type": "grpo"},
        {"surrogate": "cispo"},
        pytest.param({"scale": "each"}, marks=pytest.mark.slow),
        pytest.param({"entropy_share": 0.5, "entropy_coef": 0.01}, marks=pytest.mark.slow),
        {"overlong_buffer": 2, "dynamic_sampling": 2, "clip_range_high": 0.28},
        pytest.param({"importance_cap": 2.0}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_each_variant_starts_at_ratio_one_with_a_gradient(settings: dict[str, Any]) -> None:
    history: list[dict[str, float]] = []
    agent = make_agent(learning_rate=0.0, num_epochs=2, minibatch_size=8, **settings)
    agent.learn(16, [lambda _, metrics: history.append(metrics)])
    assert history[0]["val/ratio"] == pytest.approx(1.0, abs=ROUNDING)
    assert history[0]["policy/clipfrac_avg"] == 0
    assert history[0]["val/grad_norm"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GRPOConfig(surrogate="cispo", ratio="sequence"),
            "ratio='sequence' cannot be used with surrogate",
        ),
        (lambda: GRPOConfig(surrogate="cispo", clip_range=0.1), "clip_range=0.1 cannot be used with surrogate='cispo'"),
        (lambda: GRPOConfig(overlong_penalty=2.0), "overlong_penalty=2.0 cannot be used with overlong_buffer=None"),
        (lambda: GRPOConfig(entropy_share=0.0), "entropy_share must be above 0"),
        (lambda: PPOConfig(importance_cap=0.0), "importance_cap must be above 0"),
        (lambda: make_agent(scale="each", env={"kl_coef": 0.1}), "the KL in the reward is not one of them"),
        (lambda: make_agent(scale="each", env={"score_clip": 2.0}), "alone, and score_clip=2.0 changes their sum"),
        (
            lambda: make_agent(scale="each", env={"score_scaling": "running"}),
            "alone, and score_scaling='running' changes",
        ),
        (lambda: make_agent(overlong_buffer=7), "overlong_buffer=7 is more than the max_new_tokens=6"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
