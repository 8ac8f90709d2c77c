"""Bias and variance of estimates of the gradient of KL(pi, pi_ref) over whole texts, by enumeration.

    python benchmarks/kl_gradients.py

The policy is the reference of an `ExactTask` with normal noise on its logits, the more, the larger the KL. Each
estimate is a gradient for one sampled text. Its mean over all texts is known exactly, and so are the relative distance
of this mean from the gradient of the KL ("bias") and the standard deviation of one estimate, in units of the norm of
that gradient ("deviation"). A batch of N texts has a deviation of 1 / sqrt(N) times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from measuring.peers import Figures, report
from torch import Tensor

from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import estimate_kl, kl_to_go, sequence_kl
from textgym.testing import ExactTask

Loss = Callable[[Evaluation, Tensor], Tensor]
"""Function from an evaluation of all texts, and the log-probs `(K, T)` of the reference, to a loss `(K,)` of each."""


@dataclass
class Config:
    vocab_size: int = 5
    horizon: int = 3
    noise: tuple[float, ...] = (0.5, 1.5, 3.0)


def k1_in_reward(new: Evaluation, reference: Tensor) -> Tensor:
    """Policy gradient of the whole return: each token is charged for the KL estimates of all tokens."""
    k1 = (new.log_prob - reference).detach()
    return (new.log_prob * k1.sum(1, keepdim=True)).sum(1)


def k1_to_go(new: Evaluation, reference: Tensor) -> Tensor:
    """Policy gradient with the reward to go: each token is charged for its own estimate and later ones."""
    k1 = (new.log_prob - reference).detach()
    return (new.log_prob * (k1 + kl_to_go(k1))).sum(1)


def k1_to_go_and_others(new: Evaluation, reference: Tensor) -> Tensor:
    """The same, minus the mean of other texts."""
    k1 = (new.log_prob - reference).detach()
    returns = k1 + kl_to_go(k1)
    return (new.log_prob * (returns - of_others(new, returns))).sum(1)


def of_others(new: Evaluation, values: Tensor) -> Tensor:
    """Return the mean `(T,)` over infinitely many texts that have each token, as `compared_with_others` does of few."""
    probabilities, mask = new.log_prob.detach().sum(1, keepdim=True).exp(), new.entropy != 0
    return (probabilities * values).sum(0) / (probabilities * mask).sum(0) * mask


def k3_alone(new: Evaluation, reference: Tensor) -> Tensor:
    return estimate_kl(new.log_prob, reference, "k3").sum(1)


def k3_times_ratio(new: Evaluation, reference: Tensor) -> Tensor:
    ratio = (new.log_prob - new.log_prob.detach()).exp()
    return (ratio * estimate_kl(new.log_prob, reference, "k3")).sum(1)


def exact_of_states(new: Evaluation, reference: Tensor) -> Tensor:
    assert new.kl is not None
    return new.kl.sum(1)


def of_sequence(new: Evaluation, reference: Tensor) -> Tensor:
    assert new.kl is not None
    return sequence_kl(new.kl, new.log_prob - new.log_prob.detach(), kl_to_go(new.kl.detach())).sum(1)


def of_sequence_and_others(new: Evaluation, reference: Tensor) -> Tensor:
    assert new.kl is not None
    to_go = kl_to_go(new.kl.detach())
    return sequence_kl(new.kl, new.log_prob - new.log_prob.detach(), to_go - of_others(new, to_go)).sum(1)


ESTIMATES: dict[str, Loss] = {
    "k1 in the reward, whole return": k1_in_reward,
    "k1 in the reward, to go": k1_to_go,
    "k1 in the reward, to go, minus that of others": k1_to_go_and_others,
    "k3 in the loss": k3_alone,
    "k3 times the ratio in the loss": k3_times_ratio,
    "exact KL of states in the loss": exact_of_states,
    "sequence: exact KL of states, and KL to go": of_sequence,
    "sequence: the same, minus that of others": of_sequence_and_others,
}


def gradients(policy: ActorCritic, losses: Tensor) -> Tensor:
    """Return the gradient of each loss as a row, `(K, weights)`."""
    weights = list(policy.lm.parameters())
    rows = [torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows]).double()


def compare(config: Config) -> list[Figures]:
    """Return the rows of the table."""
    table: list[Figures] = []
    for noise in config.noise:
        policy, reference = ActorCritic(TASK.language_model()), TokenModel(TASK.language_model())
        with torch.no_grad():
            for weight in policy.lm.parameters():
                weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        sequences = TASK.sequences(TASK.texts)
        new = policy.evaluate(sequences, reference=reference)
        reference_log_probs = reference.sequence_log_probs(sequences)
        log_probs = new.log_prob.sum(1)
        probabilities = log_probs.detach().exp().double()  # (K,)
        divergence = (log_probs.exp() * (log_probs - reference_log_probs.sum(1))).sum()
        [exact] = gradients(policy, divergence[None])
        for name, estimate in ESTIMATES.items():
            each = gradients(policy, estimate(new, reference_log_probs))  # (K, weights)
            mean = probabilities @ each
            variance = probabilities @ (each - mean).square().sum(1)
            table.append(
                {
                    "noise": noise,
                    "KL": divergence.item(),
                    "estimate": name,
                    "bias": float((mean - exact).norm() / exact.norm()),
                    "deviation": float(variance.sqrt() / exact.norm()),
                }
            )
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = tyro.cli(Config)
    TASK = ExactTask(config.vocab_size, config.horizon)
    report(compare(config))
