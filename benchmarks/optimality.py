"""How near agents come to the exact optimum of the KL-regularised objective, where it is known by enumeration.

    python benchmarks/optimality.py                              # all agents on dense rewards, five seeds
    python benchmarks/optimality.py --rewards sparse --betas 0.2
    python benchmarks/optimality.py --agents ppo grpo --seeds 0 --models transformer

For each agent, reward and beta: the share of the gap from the reference to the optimum that it closed, the KL from its
policy to the optimal one, and the episodes after which it had closed 95%. See `textgym.testing.ExactTask`.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro

from textgym.agents import A2C, GRPO, NLPO, PPO, REINFORCE, RLOO
from textgym.models.actor_critic import ActorCritic
from textgym.testing import ExactTask

GROUPS = {"group_size": 16, "num_epochs": 2, "minibatch_size": 64}
PPO_SETTINGS = {"num_epochs": 2, "minibatch_size": 64, "value_coef": 0.5}
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (PPO, PPO_SETTINGS),
    "ppo-penalty": (PPO, {**PPO_SETTINGS, "variant": "penalty"}),
    "nlpo": (NLPO, {**PPO_SETTINGS, "top_p": 1.0}),
    "grpo": (GRPO, {**GROUPS, "loss_type": "dr_grpo", "scale": "none"}),
    "rloo": (RLOO, GROUPS),
    "reinforce": (REINFORCE, {"baseline": "learned"}),
    "a2c": (A2C, {}),
}
ROWS = {"reinforce": 64, "a2c": 64}
"""Episodes in an update; agents that take one step from each do better with more and smaller ones."""


@dataclass
class Args:
    agents: tuple[str, ...] = tuple(AGENTS)
    rewards: tuple[Literal["dense", "sparse", "deceptive"], ...] = ("dense",)
    betas: tuple[float, ...] = (0.2, 0.5, 1.0)
    models: tuple[Literal["table", "transformer"], ...] = ("table",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    vocab_size: int = 8
    horizon: int = 3
    episodes: int = 65_536
    table_learning_rate: float = 0.02
    transformer_learning_rate: float = 3e-3
    jobs: int = 1
    output: Path | None = None
    """A JSON file for the figures of each run."""


def run(args: Args, agent: str, reward: Any, beta: float, model: Any, seed: int) -> dict[str, float]:
    """One agent on one task."""
    torch.set_num_threads(1)
    task = ExactTask(args.vocab_size, args.horizon, reward, model, seed)
    optimum = task.optimum(beta)
    kind, settings = AGENTS[agent]
    rows = ROWS.get(agent, 256)
    envs = gym.make_vec("textgym/Text-v0", num_envs=rows, kl_mode="deferred", **task.env_kwargs(beta))
    learning_rate = args.table_learning_rate if model == "table" else args.transformer_learning_rate
    config = kind.config_class(episodes_per_update=rows, learning_rate=learning_rate, seed=seed, **settings)
    policy = ActorCritic.from_pretrained(task.language_model(), critic="separate")
    reached = float("nan")

    def watch(learner: Any, metrics: dict[str, float]) -> None:
        nonlocal reached
        if reached != reached and learner.updates % 4 == 0 and optimum.gap_closed(task.log_probs(policy)) >= 0.95:
            reached = learner.episodes

    kind(policy, envs, config).learn(args.episodes, [watch])
    log_probs = task.log_probs(policy)
    return {
        "gap_closed": optimum.gap_closed(log_probs),
        "kl_to_optimum": optimum.kl_from(log_probs),
        "episodes_to_95": reached,
        "updates_to_95": reached / rows,
    }


def main(args: Args) -> None:
    tasks = [(m, r, b) for m in args.models for r in args.rewards for b in args.betas]
    jobs = [(args, a, r, b, m, seed) for m, r, b in tasks for a in args.agents for seed in args.seeds]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(run, *zip(*jobs, strict=True)))
    rows = [{"agent": a, "reward": r, "beta": b, "model": m, "seed": s, **result}
            for (_, a, r, b, m, s), result in zip(jobs, results, strict=True)]  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")
    for model, reward, beta in tasks:
        print(f"\n{model}, {reward} rewards, beta = {beta:g}, {args.episodes} episodes, seeds {list(args.seeds)}")
        print(
            "| agent | gap closed | least | KL to the optimum | episodes to 95% | updates to 95% |\n"
            + "| --- " * 6
            + "|"
        )
        for agent in args.agents:
            same = [r for r in rows if (r["agent"], r["reward"], r["beta"], r["model"]) == (agent, reward, beta, model)]
            gaps = [row["gap_closed"] for row in same]
            cells = [f"{statistics.mean(gaps):.4f}", f"{min(gaps):.4f}"]
            cells.append(f"{statistics.mean(row['kl_to_optimum'] for row in same):.4f}")
            cells += [_middle([row[name] for row in same]) for name in ("episodes_to_95", "updates_to_95")]
            print(f"| {agent} | " + " | ".join(cells) + " |")


def _middle(values: list[float]) -> str:
    """The median over seeds; none if fewer than half of them got there."""
    reached = sorted(value for value in values if value == value)
    return f"{reached[len(values) // 2]:.0f}" if len(reached) > len(values) // 2 else "-"


if __name__ == "__main__":
    main(tyro.cli(Args))
