"""Error of bfloat16 in the log-probs, first probability ratios and gradients of an update, relative to float32.

    python benchmarks/bf16.py

The embedded model generates `rows` responses to the bundled openings, and evaluates them in float32, under autocast
(`PPOConfig.bf16`), and with bfloat16 weights (`ActorCritic.from_pretrained(dtype=)`). Differences are in nats over all
tokens. "gradient" is the relative error of the gradient of the mean log-prob: the norm of the difference, divided by
the norm of the float32 gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from measuring.peers import Figures, report
from torch import Tensor

from textgym.agents.common.rollout import collect
from textgym.models.actor_critic import ActorCritic
from textgym.models.sequences import Sequences


@dataclass
class Config:
    rows: int = 192
    new_tokens: int = 48


def scored(policy: ActorCritic, sequences: Sequences, autocast: bool) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the tokens `(M,)`, and the gradient of their mean as one vector."""
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_probs = policy.evaluate(sequences).log_prob[sequences.response_mask]
    log_probs.mean().backward()
    return log_probs.detach(), torch.cat([w.grad.float().flatten() for w in policy.lm.parameters()])


def compare(config: Config) -> list[Figures]:
    """Return the rows of the table."""
    envs = gym.make_vec(
        "textgym/Sentiment-v0", config.rows, kl_mode="deferred", max_new_tokens=config.new_tokens, array="torch"
    )
    policy = ActorCritic.from_pretrained("tiny")
    policy.seed(0)
    envs.reset(seed=0)
    sequences = collect(envs, policy).sequences
    plain, gradient = scored(policy, sequences, autocast=False)
    rows = []
    for name, other, autocast in (
        ("autocast", policy, True),
        ("weights", ActorCritic.from_pretrained("tiny", dtype=torch.bfloat16), False),
    ):
        log_probs, moved = scored(other, sequences, autocast)
        distance = (log_probs - plain).abs()
        rows.append(
            {
                "bfloat16": name,
                "tokens": len(plain),
                "mean": distance.mean().item(),
                "99% below": distance.quantile(0.99).item(),
                "largest": distance.max().item(),
                "mean ratio": (log_probs - plain).exp().mean().item(),
                "gradient": ((moved - gradient).norm() / gradient.norm()).item(),
            }
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(compare(tyro.cli(Config)))
