"""Distance of agents from the exact optimum, on tasks where it is known by enumeration.

    python benchmarks/learning/optimality.py --jobs 2             # all agents, dense rewards, five seeds
    python benchmarks/learning/optimality.py --rewards sparse --betas 0.2
    python benchmarks/learning/optimality.py --agents ppo soft-q --seeds 0 --models transformer
    python benchmarks/learning/optimality.py --hard               # the text with the highest reward, beta = 0

For each agent, reward and beta the table has the share of the gap from the reference to the optimum that the agent
closed, the KL from its policy to the optimal policy, and the number of episodes after which it had closed 95%. See
`textgym.testing.ExactTask`. `--hard` is without a KL penalty, for agents that learn values: the share of the gap from
the reference's mean reward to the highest reward that their greedy text closes.

Each agent has the same hyperparameters on all tasks of a model; `METHODS` lists those that differ from the defaults.
Stock SB3 PPO and A2C are in the first kind of task, and SB3's DQN in the second.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import stable_baselines3
import torch
import tyro

from textgym import sb3
from textgym.agents import (
    A2C,
    DPO,
    DQN,
    GRPO,
    NLPO,
    PPO,
    REINFORCE,
    RLOO,
    DPOConfig,
    ExpertIteration,
    OnlineDPO,
    Pathwise,
)
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import quiet
from textgym.testing import ExactTask

# Large updates and an entropy bonus that fades, against settling on the second best text (see docs/results.md).
ON_POLICY = {"entropy_coef": 0.1, "num_epochs": 2, "minibatch_size": 256}
GROUPS = {**ON_POLICY, "group_size": 64}
PPO_SETTINGS = {**ON_POLICY, "value_coef": 0.5}
BEST_OF_GROUPS = {"group_size": 64, "num_epochs": 2, "minibatch_size": 64}
OFF_POLICY = {"adam_epsilon": 1e-8, "epsilon_end": 0.5, "exploration_temperature": 4.0}
GREEDY = {**OFF_POLICY, "backup": "greedy"}


@dataclass(frozen=True)
class Method:
    """An agent and its settings: a class of textgym, or the name of a class of SB3."""

    kind: Any
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 1024
    """Number of episodes in an update."""
    learning_rate: float = 0.05
    """Learning rate with the tabular model."""
    first_beta: float = 1.0
    """KL coefficient of the first update, in units of beta; it falls to beta over the first half of the run."""
    transformer: dict[str, Any] = field(default_factory=lambda: {"learning_rate": 3e-3})
    """Settings of the transformer."""


METHODS = {
    "ppo": Method(PPO, PPO_SETTINGS),
    "ppo-penalty": Method(PPO, {**PPO_SETTINGS, "variant": "penalty"}),
    "nlpo": Method(NLPO, {**PPO_SETTINGS, "top_p": 1.0}),
    "grpo": Method(GRPO, {**GROUPS, "loss_type": "dr_grpo", "scale": "none"}),
    # The ratio of a sequence is a mean over its tokens, so it moves less than that of a token: a narrower clip.
    "gspo": Method(GRPO, {**GROUPS, "ratio": "sequence", "loss_type": "grpo", "scale": "none", "clip_range": 0.05}),
    # What is not clipped becomes deterministic earlier: a larger bonus.
    "cispo": Method(
        GRPO, {**GROUPS, "surrogate": "cispo", "loss_type": "dr_grpo", "scale": "none", "entropy_coef": 0.2}
    ),
    "rloo": Method(RLOO, {**GROUPS, "group_size": 16}),
    "reinforce": Method(REINFORCE, {"baseline": "learned", "entropy_coef": 0.3}, rows=64),
    "a2c": Method(A2C, {"entropy_coef": 0.3}, rows=64),
    "soft-q": Method(DQN, {**OFF_POLICY, "n_steps": 3, "max_grad_norm": 1000.0}, rows=64, learning_rate=0.2),
    "expert-iteration": Method(ExpertIteration, BEST_OF_GROUPS, rows=256),
    "online-dpo": Method(
        OnlineDPO, {**BEST_OF_GROUPS, "group_size": 2, "use_probability": True}, rows=256, first_beta=4.0
    ),
    "dpo": Method(DPO, learning_rate=0.3),
    "sb3-ppo": Method("PPO"),
    "sb3-a2c": Method("A2C"),
}
HARD = {
    "dqn": Method(DQN, GREEDY, rows=64, learning_rate=0.02),
    "double": Method(DQN, {**GREEDY, "double": True}, rows=64, learning_rate=0.02),
    "not dueling": Method(DQN, {**GREEDY, "dueling": False}, rows=64, learning_rate=0.02),
    "n-step": Method(DQN, {**GREEDY, "n_steps": 3}, rows=64, learning_rate=0.02),
    "noisy": Method(DQN, {**GREEDY, "noisy": True}, rows=64, learning_rate=0.02),
    "quantiles": Method(DQN, {**GREEDY, "n_quantiles": 8}, rows=64, learning_rate=0.02),
    "prioritised": Method(DQN, {**GREEDY, "prioritised": True}, rows=64, learning_rate=0.02),
    "double + prioritised + quantiles": Method(
        DQN, {**GREEDY, "double": True, "prioritised": True, "n_quantiles": 8}, rows=64, learning_rate=0.02
    ),
    "pathwise": Method(
        Pathwise,
        {**OFF_POLICY, "relaxation_temperature": 16.0, "anneal_learning_rate": False},
        rows=64,
        learning_rate=0.02,
    ),
    "sb3-dqn": Method("DQN"),
}


@dataclass
class Args:
    hard: bool = False
    """Without a KL penalty, for agents that learn values; their greedy text is evaluated."""
    agents: tuple[str, ...] = ()
    """Names from `METHODS`, or with --hard from `HARD`; all of them if not given."""
    rewards: tuple[Literal["dense", "sparse", "deceptive"], ...] = ("dense",)
    betas: tuple[float, ...] = (0.2, 0.5, 1.0)
    models: tuple[Literal["table", "transformer"], ...] = ("table",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    vocab_size: int = 8
    horizon: int = 3
    episodes: int = 65_536
    settings: str = "{}"
    """Settings of the agents to override, as JSON, for experiments."""
    jobs: int = 1
    output: Path | None = None
    """JSON file for the metrics of each run."""

    @property
    def methods(self) -> dict[str, Method]:
        known = HARD if self.hard else METHODS
        return {name: known[name] for name in self.agents or known}


@dataclass
class FallingKL:
    """A KL coefficient that falls in a straight line over the first episodes of a run, and then stays."""

    coef: float
    last: float
    """What it falls to."""
    left: float
    """Number of episodes until it is `last`."""

    def update(self, kl: float, num_episodes: int) -> None:
        """Lower the coefficient, whatever the KL."""
        if num_episodes < self.left:
            self.coef -= (self.coef - self.last) * num_episodes / self.left
            self.left -= num_episodes
        else:
            self.coef, self.left = self.last, 0


@dataclass
class Run:
    """One agent on one task."""

    args: Args
    method: Method
    task: ExactTask
    beta: float
    model: str
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the agent."""
        own = {"learning_rate": self.method.learning_rate} if self.model == "table" else self.method.transformer
        return {**self.method.settings, **own, **json.loads(self.args.settings)}

    @property
    def rows(self) -> int:
        """Number of episodes in an update."""
        return int(self.settings.get("rows", self.method.rows))

    @property
    def kl_coef(self) -> Any:
        """Beta, or the controller whose coefficient falls to it."""
        first = float(self.settings.get("first_beta", self.method.first_beta))
        return FallingKL(first * self.beta, self.beta, self.args.episodes / 2) if first > 1 else self.beta

    def gap_closed(self, policy: ActorCritic) -> float:
        optimum = self.task.optimum(self.beta)
        if self.args.hard:
            start = optimum.objective(self.task.log_reference)
            return float((self.task.greedy_reward(policy) - start) / (self.task.rewards.max() - start))
        return optimum.gap_closed(self.task.log_probs(policy))


def online(run: Run) -> tuple[ActorCritic, float]:
    """Train an agent of textgym; return its policy, and the number of episodes until 95% of the gap was closed."""
    rows = run.rows
    settings = {name: value for name, value in run.settings.items() if name not in ("rows", "first_beta")}
    arguments = {**run.task.env_kwargs(run.beta), "kl_coef": run.kl_coef}
    envs = gym.make_vec("textgym/Text-v0", num_envs=rows, kl_mode="deferred", **arguments)
    policy = ActorCritic.from_pretrained(run.task.language_model(), critic="separate")
    kind, reached = run.method.kind, math.nan
    agent = kind(policy, envs, kind.config_class(episodes_per_update=rows, seed=run.seed, **settings))

    bonus = settings.get("entropy_coef", 0.0)

    def fade(learner: Any) -> None:
        """Lower the bonus; at the end it does not move the optimum."""
        if bonus:
            learner.config.entropy_coef = bonus * (1 - learner.episodes / run.args.episodes)

    def watch(learner: Any, metrics: dict[str, float]) -> None:
        nonlocal reached
        fade(learner)
        if math.isnan(reached) and learner.updates % 4 == 0 and run.gap_closed(policy) >= 0.95:
            reached = learner.episodes

    fade(agent)
    agent.learn(run.args.episodes, [watch])
    return policy, reached


def stock(run: Run) -> tuple[ActorCritic, float]:
    """Train an unmodified agent of SB3; return the same as `online`."""
    warnings.filterwarnings("ignore", category=UserWarning)
    task, steps = run.task, run.args.episodes * run.task.horizon
    learning_rate = run.settings["learning_rate"]
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            task.language_model().save_pretrained(folder)
        arguments = task.env_kwargs(run.beta)
        if run.method.kind == "DQN":
            env = sb3.make_vec_env("textgym/Text-v0", n_envs=16, kl_mode="reference", **arguments)
            model: Any = stable_baselines3.DQN(
                sb3.TextQPolicy,
                env,
                learning_rate=lambda left: learning_rate * left,
                gamma=1.0,
                seed=run.seed,
                batch_size=192,
                buffer_size=24_576,
                learning_starts=768,
                train_freq=12,
                gradient_steps=4,
                target_update_interval=768,
                exploration_fraction=0.5,
                exploration_final_eps=0.5,
                replay_buffer_class=sb3.EpisodeReplayBuffer,
                policy_kwargs={"model": folder},
            )
            return ActorCritic(model.learn(steps, log_interval=10**6).policy.online.model.lm), math.nan
        env = sb3.make_vec_env("textgym/Text-v0", n_envs=64, **arguments)
        own = {"batch_size": 192, "n_epochs": 2} if run.method.kind == "PPO" else {}
        model = getattr(stable_baselines3, run.method.kind)(
            sb3.TextActorCriticPolicy,
            env,
            n_steps=12 if run.method.kind == "PPO" else 3,
            learning_rate=lambda left: learning_rate * left,
            gamma=1.0,
            seed=run.seed,
            rollout_buffer_class=sb3.EpisodeRolloutBuffer,
            rollout_buffer_kwargs={"reference": folder, "kl_coef": run.beta},
            policy_kwargs={"model": folder, "critic": "separate"},
            **own,
        )
        return model.learn(steps, log_interval=10**6).policy.actor_critic, math.nan


def preferred(run: Run) -> tuple[ActorCritic, float]:
    """Train DPO on pairs of texts with preference probabilities sigmoid(r - r') (Bradley and Terry, 1952)."""
    task = run.task
    texts = [task.tokenizer.decode(list(text)) for text in task.texts]
    pairs = []
    for better in range(len(texts)):
        for worse in torch.randperm(len(texts), generator=torch.Generator().manual_seed(better))[:32].tolist():
            if better != worse:
                probability = 1 / (1 + math.exp(task.rewards[worse] - task.rewards[better]))
                pair = {"prompt": "a", "chosen": texts[better], "rejected": texts[worse], "probability": probability}
                pairs.append(pair)
    policy = ActorCritic.from_pretrained(task.language_model())
    shape = {"append_eos": False, "epochs": 40, "batch_size": 256}  # texts of full length do not end
    config = DPOConfig(beta=run.beta, use_probability=True, seed=run.seed, **{**shape, **run.settings})
    DPO(policy, pairs, task.tokenizer, config).learn()
    return policy, math.nan


def measured(args: Args, method: Method, reward: Any, beta: float, model: Any, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    task = ExactTask(args.vocab_size, args.horizon, reward, model, seed)
    run = Run(args, method, task, beta, model, seed)
    learn = stock if isinstance(method.kind, str) else preferred if method.kind is DPO else online
    policy, reached = learn(run)
    figures = {"gap_closed": run.gap_closed(policy), "episodes_to_95": reached}
    if not args.hard:
        figures["kl_to_optimum"] = task.optimum(beta).kl_from(task.log_probs(policy))
    return {**figures, "updates_to_95": reached / run.rows}


def main(args: Args) -> None:
    betas = (0.0,) if args.hard else args.betas
    tasks = [(m, r, b) for m in args.models for r in args.rewards for b in betas]
    jobs = [(a, r, b, m, seed) for m, r, b in tasks for a in args.methods for seed in args.seeds]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measured, args, args.methods[a], r, b, m, seed) for a, r, b, m, seed in jobs]
        results = [future.result() for future in futures]
    rows = [{"agent": a, "reward": r, "beta": b, "model": m, "seed": s, **result}
            for (a, r, b, m, s), result in zip(jobs, results, strict=True)]  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")
    for model, reward, beta in tasks:
        print(f"\n{model}, {reward} rewards, beta = {beta:g}, {args.episodes} episodes, seeds {list(args.seeds)}")
        columns = ("agent", "gap closed", "least", "KL to the optimum", "episodes to 95%", "updates to 95%")
        print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
        for agent in args.methods:
            same = [r for r in rows if (r["agent"], r["reward"], r["beta"], r["model"]) == (agent, reward, beta, model)]
            gaps = [row["gap_closed"] for row in same]
            cells = [f"{statistics.mean(gaps):.4f}", f"{min(gaps):.4f}"]
            cells.append(f"{statistics.mean(row.get('kl_to_optimum', math.nan) for row in same):.4f}")
            cells += [_middle([row[name] for row in same]) for name in ("episodes_to_95", "updates_to_95")]
            print(f"| {agent} | " + " | ".join(cells) + " |")


def _middle(values: list[float]) -> str:
    """Return the median over seeds as text; empty if fewer than half of the seeds have a value."""
    reached = sorted(value for value in values if not math.isnan(value))
    return f"{reached[len(values) // 2]:.0f}" if len(reached) > len(values) // 2 else "-"


if __name__ == "__main__":
    main(tyro.cli(Args))
