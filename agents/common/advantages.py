"""Advantage estimates over padded (N, T) episodes. Padding is excluded, whatever its values are, NaN included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from textgym.settings import Share, check_arguments

from ..machine.distributed import column_total
from .means import differs, masked


@check_arguments
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: Share, lam: Share, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and returns (Schulman et al., 2016, equation 16).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lambda A_{t+1};  R_t = A_t + V(s_t).

    Args:
        rewards: `(N, T)`; the reward of an action is at the index of the action.
        values: `(N, T)`, the value of the state before each action.
        mask: Bool `(N, T)`, the steps of the policy. Tokens of the environment between them are skipped.
        gamma: Discount.
        lam: lambda.
        bootstrap: `(N,)`, value of the state after the last action of a truncated row; 0 if the row terminated.

    Returns:
        Advantages and returns, `(N, T)` each, zero in the padding.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    following = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap  # V(s_{t+1})
    running = torch.zeros_like(following)  # A_{t+1}
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = delta + gamma * lam * running
        advantages[:, t] = masked(advantage, mask[:, t])
        following = torch.where(mask[:, t], values[:, t], following)
        running = torch.where(mask[:, t], advantage, running)
    return advantages, masked(advantages + values, mask)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return G_t = r_t + gamma G_{t+1}, `(N, T)`, the discounted sum of rewards from each action on."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def n_step_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, n: int, goes_on: Tensor | None = None
) -> Tensor:
    """Return n-step returns sum_{i<n} gamma^i r_{t+i} + gamma^n V(s_{t+n}), `(N, T)`.

    Steps are those of the policy: tokens of the environment between them are skipped. After the end of a row rewards
    and values are zero.

    Args:
        rewards: `(N, T)`.
        values: `(N, T)`, the value of the state before each action.
        mask: Bool `(N, T)`, the steps of the policy.
        gamma: Discount.
        n: Number of rewards before bootstrapping.
        goes_on: Bool `(N, T)`, whether each action is greedy. The sum ends with bootstrapping before the first action
            after t that is not greedy, because its reward is not that of the greedy policy (Watkins, 1989).
    """
    own = own_steps(mask)  # (N, T)
    rewards, values = (masked(x, mask).gather(1, own) for x in (rewards, values))
    following = _shifted(values)  # V(s_{t+1})
    returns = rewards + gamma * following
    for _ in range(min(n, rewards.shape[1]) - 1):
        later = _shifted(returns)
        if goes_on is not None:
            later = torch.where(_shifted(goes_on.gather(1, own)), later, following)
        returns = rewards + gamma * later
    return masked(torch.zeros_like(returns).scatter(1, own, returns), mask)


def own_steps(mask: Tensor) -> Tensor:
    """Return the indices `(N, T)` of the policy's steps in order, and then those of all others, of a mask `(N, T)`."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, steps, steps + len(steps)).argsort(dim=1)


def _shifted(values: Tensor) -> Tensor:
    """Return the value of the next step for each step; zero for the last one."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def leave_one_out_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the other rows of all processes that have a step t, for each t, `(N, T)`; 0 without others.

    The value of the row itself is left out, because a baseline must not depend on the row's action. Steps are those of
    the policy: tokens of the environment between them are skipped.
    """
    own = own_steps(mask)  # (N, T)
    real = masked(values, mask).double().gather(1, own)  # in float64 the mean of equal float32 values is their value
    others = mask.gather(1, own)
    count = column_total(others.sum(0)) - others.long()
    mean = (column_total(real.sum(0)) - real) / count.clamp(min=1)
    return masked(torch.zeros_like(mean).scatter(1, own, mean), mask).to(values.dtype)


class GroupComparison(NamedTuple):
    """Comparison of the returns within groups of episodes; G groups of k episodes.

    Attributes:
        differences: `(G, k)` float64, each return minus the mean of its group; exactly 0 for episodes without a score,
            and in groups of equal returns.
        standard_deviation: `(G, 1)` float64, sample standard deviation of each group (divisor n - 1).
        num_scored: `(G, 1)`, n, the number of episodes of each group that have a score.
        comparable: Bool `(G, k)`, the episodes that have a score in groups with at least two scores.
        informative: Bool `(G, 1)`, the groups in which at least two returns differ.
    """

    differences: Tensor
    standard_deviation: Tensor
    num_scored: Tensor
    comparable: Tensor
    informative: Tensor


def compare_groups(returns: Tensor, scored: Tensor) -> GroupComparison:
    """Compare the returns `(G, k)` of each group, over the episodes that have a score, bool `(G, k)`."""
    num_scored = scored.sum(1, keepdim=True)
    returns = masked(returns.double(), scored)  # float64, so that equal returns equal their mean exactly
    mean = returns.sum(1, keepdim=True) / num_scored.clamp(min=1)
    differences = masked(returns - mean, scored)
    standard_deviation = (differences.square().sum(1, keepdim=True) / (num_scored - 1).clamp(min=1)).sqrt()
    informative = differs(standard_deviation, mean)
    differences = masked(differences, informative)
    return GroupComparison(differences, standard_deviation, num_scored, scored & (num_scored > 1), informative)
