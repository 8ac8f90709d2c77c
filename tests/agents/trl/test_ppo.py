"""PPO's arithmetic equals that of TRL 1.12, recorded by scripts/peers/record_ppo.py, where the definitions agree.

TRL pays the score on the token after the last one and learns a value there, so its `longer` mask has one token more.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from textgym.agents import PPO, PPOConfig
from textgym.agents.common.advantages import gae
from textgym.agents.common.means import masked_mean, whiten
from textgym.agents.common.policy_gradient import Batch
from textgym.models.actor_critic import Evaluation
from textgym.testing import assert_close, tolerance

pytestmark = pytest.mark.numerics

TRL = json.loads(Path(__file__).with_name("ppo.json").read_text())
LAST, SCORES = torch.tensor(TRL["last"]), torch.tensor(TRL["scores"])
WIDTH = len(TRL["cases"][0]["values"][0])
MASK, LONGER = (torch.arange(WIDTH) <= (LAST + extra)[:, None] for extra in (0, 1))
CASES = pytest.mark.parametrize("case", TRL["cases"], ids=lambda c: f"{c['gamma']}, {c['lam']}, {c['whiten_rewards']}")


def tensors(case: dict[str, Any], *names: str) -> list[Tensor]:
    return [torch.tensor(case[name]) for name in names]


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, terms=MASK.numel())


def test_it_is_the_version_that_the_docstring_names() -> None:
    assert TRL["trl"] == "1.12.0"


@CASES
def test_advantages_and_returns(case: dict[str, Any]) -> None:
    rewards, values, advantages, returns = tensors(case, "rewards", "values", "raw_advantages", "returns")
    ours = gae(rewards, values, LONGER, case["gamma"], case["lam"])
    assert_equal(ours[0], advantages)
    assert_equal(ours[1], returns)


@CASES
def test_whitened_advantages_but_for_the_unbiased_variance(case: dict[str, Any]) -> None:
    raw, advantages = tensors(case, "raw_advantages", "advantages")
    n = int(MASK.sum())
    assert_equal(whiten(raw, MASK) * math.sqrt((n - 1) / n), advantages)


@CASES
def test_rewards_and_their_whitening(case: dict[str, Any]) -> None:
    unscored, theirs = tensors(case, "unscored", "rewards")
    rewards = unscored.scatter_add(1, (LAST + 1).clamp(max=WIDTH - 1)[:, None], SCORES[:, None])
    if case["whiten_rewards"]:
        n, mean = int(LONGER.sum()), masked_mean(rewards, LONGER)
        scaled = (whiten(rewards, LONGER, shift_mean=False) - mean) * math.sqrt((n - 1) / n) + mean
        rewards = torch.where(LONGER, scaled, 0.0)
    assert_equal(rewards, theirs)


def figures_of(mask: Tensor, **columns: Tensor) -> dict[str, float]:
    """Those of PPO's loss at the default settings, of columns `(N, T)` that are 0 unless they are given."""
    empty = torch.zeros(mask.shape)
    new = Evaluation(columns.get("new", empty), columns.get("new_values", empty), empty)
    old = [columns.get(name, empty) for name in ("log_probs", "values", "advantages", "returns")]
    batch = Batch(SimpleNamespace(response_mask=mask), *old, torch.arange(len(mask)))  # type: ignore[arg-type]
    agent = PPO.__new__(PPO)  # the loss needs no policy and no environment
    agent.config = PPOConfig(normalise_values=False)
    return {name: float(figure) for name, figure in agent.loss(new, batch)[1].items()}


@CASES
def test_policy_loss(case: dict[str, Any]) -> None:
    new, old, advantages = tensors(case, "new_logprobs", "logprobs", "advantages")
    ours = figures_of(MASK, new=new, log_probs=old, advantages=advantages)
    assert ours["loss/policy_avg"] == pytest.approx(case["pg_loss"], abs=tolerance(MASK.numel()))
    assert ours["policy/clipfrac_avg"] == pytest.approx(case["pg_clipfrac"], abs=tolerance(MASK.numel()))
    assert case["pg_clipfrac"] > 0


@CASES
def test_value_loss(case: dict[str, Any]) -> None:
    predicted, values, returns = tensors(case, "vpred", "values", "returns")
    ours = figures_of(LONGER, new_values=predicted, values=values, returns=returns)
    assert ours["loss/value_avg"] == pytest.approx(case["vf_loss"], abs=tolerance(MASK.numel()))
    assert ours["val/clipfrac_avg"] == pytest.approx(case["vf_clipfrac"], abs=tolerance(MASK.numel()))
    assert case["vf_clipfrac"] > 0


def test_the_score_is_paid_on_the_last_token_and_not_after_it() -> None:
    """The two agree on a response that fills the width, which has no token after it, and on no other."""
    case = TRL["cases"][0]
    unscored, values, theirs = tensors(case, "unscored", "values", "raw_advantages")
    rewards = unscored.scatter_add(1, LAST[:, None], SCORES[:, None])
    ours, _ = gae(rewards, values, MASK, case["gamma"], case["lam"])
    agree = [
        torch.allclose(a[m], b[m], atol=tolerance(WIDTH, scale=3.0), rtol=0)
        for a, b, m in zip(ours, theirs, MASK, strict=True)
    ]
    assert agree == (LAST == WIDTH - 1).tolist()
    end = torch.arange(len(LAST)), LAST
    assert_equal(ours[end], (rewards - values)[end])
