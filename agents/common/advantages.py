"""Advantage estimates over padded (N, T) episodes. Padding never takes part, whatever stands in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from textgym.settings import Share, check_arguments

from ..machine.distributed import column_total
from .means import differs


@check_arguments
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: Share, lam: Share, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al., 2016, equation 16).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lambda A_{t+1};  R_t = A_t + V(s_t).

    Args:
        rewards: `(N, T)`; the reward of an action stands at the action.
        values: `(N, T)`, the value of the state before each action.
        mask: bool `(N, T)`, the real steps; what the environment wrote in between is stepped over.
        gamma: discount.
        lam: lambda.
        bootstrap: `(N,)`, value of the state after the last action of a truncated row; 0 if the row terminated.

    Returns:
        advantages and returns, `(N, T)` each, zero in the padding.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap  # V(s_{t+1})
    running = torch.zeros_like(following)  # A_{t+1}
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = delta + gamma * lam * running
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        following = torch.where(mask[:, t], values[:, t], following)
        running = torch.where(mask[:, t], advantage, running)
    return advantages, torch.where(mask, advantages + values, 0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, `(N, T)`: what is paid from each action on; zero in the padding."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def n_step_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, n: int, goes_on: Tensor | None = None
) -> Tensor:
    """Rewards of n steps and then the critic: sum_{i<n} gamma^i r_{t+i} + gamma^n V(s_{t+n}), `(N, T)`.

    Steps are the agent's own: what the environment wrote in between is stepped over. Past the end of a row there are
    neither rewards nor a value.

    Args:
        rewards: `(N, T)`.
        values: `(N, T)`, the value of the state before each action.
        mask: bool `(N, T)`, the real steps.
        gamma: discount.
        n: steps.
        goes_on: bool `(N, T)`, the actions that the values would have chosen themselves. At the first other one, the
            action t itself aside, the critic takes over, so that nothing is learned from what was a mistake (Watkins,
            1989).
    """
    own = (~mask).long().argsort(dim=1, stable=True)  # (N, T): the agent's steps in their order, then the others
    rewards, values = (torch.where(mask, x, 0.0).gather(1, own) for x in (rewards, values))
    following = _shifted(values)  # V(s_{t+1})
    returns = rewards + gamma * following
    for _ in range(min(n, rewards.shape[1]) - 1):
        later = _shifted(returns)
        if goes_on is not None:
            later = torch.where(_shifted(goes_on.gather(1, own)), later, following)
        returns = rewards + gamma * later
    return torch.where(mask, torch.zeros_like(returns).scatter(1, own, returns), 0.0)


def _shifted(values: Tensor) -> Tensor:
    """Of each step, the next step's; nothing past the end."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def leave_one_out_mean(values: Tensor, mask: Tensor) -> Tensor:
    """At each step the mean over the other rows of all processes that got as far, `(N, T)`; 0 where there is no other.

    A row's own value is left out, so that as a baseline it does not depend on the row's action.
    """
    real = torch.where(mask, values, 0.0).double()  # in which the mean of equal values is exactly their value
    count = column_total(mask.sum(0)) - mask.long()
    mean = (column_total(real.sum(0)) - real) / count.clamp(min=1)
    return torch.where(mask, mean, 0.0).to(values.dtype)


class GroupComparison(NamedTuple):
    """How the returns of the episodes of each group differ; G groups of k episodes.

    Attributes:
        differences: `(G, k)` float64, of each return from the mean of its group; exactly 0 for episodes without a
            score, and in groups that teach nothing.
        standard_deviation: `(G, 1)` float64, of each group, with n - 1.
        num_scored: `(G, 1)`, the episodes of each group that have a score, n.
        comparable: bool `(G, k)`, the episodes that have a score, in groups of at least two such.
        informative: bool `(G, 1)`, the groups that teach something: at least two of their returns differ.
    """

    differences: Tensor
    standard_deviation: Tensor
    num_scored: Tensor
    comparable: Tensor
    informative: Tensor


def compare_groups(returns: Tensor, scored: Tensor) -> GroupComparison:
    """Compare the returns `(G, k)` of each group, of those episodes that have a score, bool `(G, k)`."""
    num_scored = scored.sum(1, keepdim=True)
    returns = torch.where(scored, returns.double(), 0.0)  # in which the mean of equal values is exactly their value
    mean = returns.sum(1, keepdim=True) / num_scored.clamp(min=1)
    differences = torch.where(scored, returns - mean, 0.0)
    standard_deviation = (differences.square().sum(1, keepdim=True) / (num_scored - 1).clamp(min=1)).sqrt()
    informative = differs(standard_deviation, mean)
    differences = torch.where(informative, differences, 0.0)
    return GroupComparison(differences, standard_deviation, num_scored, scored & (num_scored > 1), informative)
