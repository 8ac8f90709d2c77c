"""Whole updates of PPO equal those of TRL 1.12 (recorded by scripts/peers/record_ppo_updates.py): the same weights.

An update is a rollout of prompts of unequal lengths, two epochs of steps of SGD, and steps that accumulate gradients.
Where all responses fill the length, three definitions differ, and each is replaced by TRL's:

- TRL whitens with the unbiased variance. For advantages of n tokens this is a factor sqrt((n - 1) / n), which with SGD
  is one of the policy's learning rate; for rewards it is another function `whiten`.
- Its minibatches are in numpy's order, which is recorded.
- Its means of metrics are over steps and over each place for a micro-batch, used or not.

Where responses end early, TRL pays the score on the token after the last one, and learns a value there.

- Advantages and returns are those of the score gamma (V + lambda (score - V)), V being the critic's value after the
  last token; with gamma = lambda = 1 this is the score. With it the policy is the same after a whole update.
- The critic's gradient is that of the tokens of both, and of the token after the last one. Later steps, later updates
  and whitened rewards differ by what follows from it.
- Micro-batches have equal weight in TRL however many tokens they have, so these cases have one each step.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from textgym.agents import PPO, PPOConfig, ppo
from textgym.agents.common.means import overall_mean, whiten
from textgym.agents.common.rollout import Rollout
from textgym.models.actor_critic import ActorCritic
from textgym.models.letter_tokenizer import letter_tokenizer
from textgym.models.sequences import Sequences
from textgym.testing import assert_close, mock_lm

pytestmark = pytest.mark.numerics

FILE = Path(__file__).with_name("ppo_updates.safetensors")
VOCABULARY, ROWS, LONGEST, PADDING = 8, 32, 6, 8
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no kl, discounted": {"kl_coef": 0.0, "gamma": 0.9, "lam": 0.8},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3", "value_coef": 0.5, "temperature": 0.7},
    "clipped": {"learning_rate": 0.5, "clip_range": 0.05, "clip_range_value": 0.05, "value_coef": 0.5},
    "one minibatch": {"learning_rate": 0.5, "minibatch_size": 32},
    "whitened rewards": {"kl_coef": 0.3, "whiten_rewards": True, "lam": 0.8},
    "early": {"minibatch_size": 8, "micro_batch_size": None, "gamma": 0.9, "lam": 0.8},
    "early, one step": {"minibatch_size": 32, "micro_batch_size": None, "num_epochs": 1, "lam": 1.0},
}
"""Settings of each case of the script, with their names in textgym."""
FULL = [case for case in CASES if "early" not in case]
EARLY = [case for case in CASES if "early" in case]
FAST = ("clipped", "whitened rewards")


def recorded(name: str) -> Tensor:
    with safe_open(FILE, framework="pt") as file:
        return file.get_tensor(name)


def recorded_metrics(case: str) -> list[dict[str, float]]:
    with safe_open(FILE, framework="pt") as file:
        return json.loads(file.metadata()["metrics"])[case]


def unbiased_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    n = int(mask.sum())
    mean = 0.0 if shift_mean else overall_mean(values, mask)
    return torch.where(mask, whiten(values, mask) * math.sqrt((n - 1) / n) + mean, 0.0)


def critic_weights(policy: ActorCritic) -> list[Any]:
    return [*policy.critic.parameters(), *policy.value_head.parameters()]


def policy_vector(agent: PPO) -> Tensor:
    return parameters_to_vector(agent.policy.lm.parameters()).detach()


def critic_vector(agent: PPO) -> Tensor:
    return parameters_to_vector(critic_weights(agent.policy)).detach()


def before(case: str, update: int) -> str:
    """Return the prefix of the names of the weights before an update."""
    return f"{case}/{update - 1}/" if update else ""


def load(policy: ActorCritic, prefix: str) -> None:
    vector_to_parameters(recorded(f"{prefix}policy"), policy.lm.parameters())
    vector_to_parameters(recorded(f"{prefix}critic"), critic_weights(policy))


def language_model() -> Any:
    return mock_lm(VOCABULARY, hidden_size=8, num_layers=1, pad_token_id=None)


def make_agent(case: str, unbiased: bool = False) -> PPO:
    """An agent with the weights that TRL started from; unless `whiten` is unbiased, the policy has a learning rate."""
    given = {"kl_coef": 0.05, "kl_estimator": "k1", "temperature": 1.0, "learning_rate": 0.2, **CASES[case]}
    learning_rate = given.pop("learning_rate")
    lm, reference = language_model(), language_model()
    policy = ActorCritic(lm, language_model().base_model, given.pop("temperature"))
    load(policy, "")
    vector_to_parameters(recorded("reference"), reference.parameters())
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=ROWS,
        prompts=["a"],
        tokenizer=letter_tokenizer(VOCABULARY),
        reward=lambda completions, **_: np.zeros(len(completions)),
        max_prompt_tokens=4,
        max_new_tokens=LONGEST,
        reference=reference,
        kl_mode="deferred",
        kl_coef=given.pop("kl_coef"),
        kl_estimator=given.pop("kl_estimator"),
    )
    n = int(recorded(f"{case}/0/lengths").sum())
    config = {
        "learning_rate": learning_rate * (1 if unbiased else math.sqrt((n - 1) / n)),
        "critic_learning_rate": learning_rate,
        "anneal_learning_rate": False,
        "optimizer": "SGD",
        "max_grad_norm": 1e9,
        "normalise_values": False,
        "episodes_per_update": ROWS,
        "minibatch_size": 16,
        "micro_batch_size": 8,
    }
    return PPO(policy, envs, PPOConfig(**{**config, **given}))


def set_orders(monkeypatch: pytest.MonkeyPatch, case: str, update: int) -> None:
    """Let the epochs of the next update have TRL's orders of episodes."""
    orders = iter(recorded(f"{case}/{update}/orders").long())
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: next(orders))


def rollout_of(case: str, update: int, policy: ActorCritic) -> Rollout:
    """What TRL sampled, as a rollout; its log-probs and values are the policy's."""
    ids, lengths, scores = (recorded(f"{case}/{update}/{name}") for name in ("ids", "lengths", "scores"))
    prompts = [row[row != PADDING] for row in ids.long()[:, :-LONGEST]]
    responses = [row[:length] for row, length in zip(ids.long()[:, -LONGEST:], lengths, strict=True)]
    rows = [torch.cat(parts) for parts in zip(prompts, responses, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sequences = Sequences(input_ids, torch.tensor([len(prompt) for prompt in prompts]), lengths.long())
    log_probs, values = policy.sequence_log_probs(sequences), policy.sequence_values(sequences)
    rewards = at_the_last_token(sequences, scores)
    return Rollout(sequences, log_probs, values, rewards, scores, scores, lengths < LONGEST, {})


def at_the_last_token(sequences: Sequences, scores: Tensor) -> Tensor:
    rewards = torch.zeros(sequences.response_mask.shape)
    return rewards.scatter(1, sequences.response_lengths[:, None] - 1, scores[:, None])


def value_after_the_last_token(case: str, update: int) -> Tensor:
    """Return the critic's value of the state after each response; of no meaning where it fills the length."""
    lengths = recorded(f"{case}/{update}/lengths").long().clamp(max=LONGEST - 1)
    return recorded(f"{case}/{update}/values").gather(1, lengths[:, None])[:, 0]


def test_the_records_are_of_the_version_that_the_docstring_names() -> None:
    with safe_open(FILE, framework="pt") as file:
        assert file.metadata()["trl"] == "1.12.0"


def test_the_records_have_unequal_prompts_active_clips_and_weights_that_move() -> None:
    for case in CASES:
        lengths = {int(length) for update in range(2) for length in recorded(f"{case}/{update}/lengths")}
        assert lengths == (set(range(1, LONGEST + 1)) if case in EARLY else {LONGEST})
        assert len(set((recorded(f"{case}/0/ids")[:, :-LONGEST] == PADDING).sum(1).tolist())) == 4
        for part in ("policy", "critic"):
            assert (recorded(f"{case}/1/{part}") - recorded(part)).abs().max() > 0.01
    for update in range(2):
        metrics = recorded_metrics("clipped")[update]
        assert metrics["policy/clipfrac_avg"] > 0.1
        assert metrics["val/clipfrac_avg"] > 0.1


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in FULL])
def test_weights_after_whole_updates_of_ppo_are_those_of_trl(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unbiased = "whiten_rewards" in CASES[case]
    if unbiased:
        monkeypatch.setattr(ppo, "whiten", unbiased_whiten)
    agent = make_agent(case, unbiased)
    for update in range(2):
        rollout = rollout_of(case, update, agent.policy)
        assert_close(rollout.values, recorded(f"{case}/{update}/values"), terms=1000)
        set_orders(monkeypatch, case, update)
        metrics = agent.update(rollout, agent.measure_kl(rollout))

        n = rollout.sequences.num_tokens
        advantages = recorded(f"{case}/{update}/advantages") * (1.0 if unbiased else math.sqrt(n / (n - 1)))
        assert_close(agent.advantages, advantages, terms=1000)
        assert_close(policy_vector(agent), recorded(f"{case}/{update}/policy"), terms=1000)
        assert_close(critic_vector(agent), recorded(f"{case}/{update}/critic"), terms=1000)
        places = 1 if case == "one minibatch" else 2
        means = {name: places * mean for name, mean in recorded_metrics(case)[update].items()}
        assert_close({name: metrics[name] for name in means}, means, terms=1000)


@pytest.mark.parametrize("case", EARLY)
def test_the_policy_is_that_of_trl_if_the_value_after_the_last_token_is_part_of_the_score(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "whiten", unbiased_whiten)
    agent = make_agent(case, unbiased=True)
    gamma, lam = agent.config.gamma, agent.config.lam
    for update in range(2):
        load(agent.policy, before(case, update))  # the critic of the update before is not that of TRL
        rollout = rollout_of(case, update, agent.policy)
        value = value_after_the_last_token(case, update)
        score = torch.where(rollout.ended_by_stop, gamma * (value + lam * (rollout.scores - value)), rollout.scores)
        if gamma == lam == 1:
            assert_close(score, rollout.scores, terms=2)
        rollout = replace(rollout, rewards=at_the_last_token(rollout.sequences, score))
        set_orders(monkeypatch, case, update)
        agent.update(rollout, agent.measure_kl(rollout))

        advantages = torch.where(rollout.response_mask, recorded(f"{case}/{update}/advantages"), 0.0)
        assert_close(agent.advantages, advantages, terms=1000)
        assert_close(policy_vector(agent), recorded(f"{case}/{update}/policy"), terms=1000)
        assert (critic_vector(agent) - recorded(f"{case}/{update}/critic")).abs().max() > 1e-3


def test_the_critic_of_trl_makes_our_step_and_that_of_the_token_after_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = "early, one step"
    monkeypatch.setattr(ppo, "whiten", unbiased_whiten)
    agent = make_agent(case, unbiased=True)
    rate = agent.config.critic_learning_rate * agent.config.value_coef
    for update in range(2):
        load(agent.policy, before(case, update))
        rollout = rollout_of(case, update, agent.policy)
        sequences, early = rollout.sequences, rollout.ended_by_stop
        n, more = sequences.num_tokens, int(early.sum())

        lengths = sequences.response_lengths
        longer = Sequences(F.pad(sequences.input_ids, (0, 1)), sequences.prompt_lengths, lengths + early)
        values = agent.policy.evaluate(longer).value
        last = values.gather(1, lengths.clamp(max=LONGEST - 1)[:, None])[:, 0]
        assert_close(last[early], value_after_the_last_token(case, update)[early], terms=1000)
        error = 0.5 * (last - rollout.scores)[early].square().sum()
        gradient = parameters_to_vector(torch.autograd.grad(error, critic_weights(agent.policy)))

        start = critic_vector(agent)
        agent.update(rollout, agent.measure_kl(rollout))
        ours = critic_vector(agent) - start
        theirs = recorded(f"{case}/{update}/critic") - start
        assert_close((n * ours - rate * gradient) / (n + more), theirs, terms=1000, scale=1.0)
        assert (theirs - ours).abs().max() > 1e-3
