"""Token-level PPO against a learned reward model, with everything embedded: no download, under a minute on a CPU.

    python examples/ppo_sentiment.py
    python examples/ppo_sentiment.py --total-episodes 6144 --kl-coef 0.02 --output-dir runs/sentiment

Left out: real prompts, training of the reward model and an independent judge, which `make demo` has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from rich.console import Console

import textgym  # noqa: F401  (registers the ids)
from textgym import ActorCritic
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.evaluation import generate, measure
from textgym.agents.runs.run_folder import figures_table


@dataclass
class Args:
    total_episodes: int = 1536
    """Episodes that PPO plays."""
    num_envs: int = 64
    """Rows of the environment; each update collects one episode in every row."""
    max_new_tokens: int = 24
    """Longest completion, in tokens."""
    kl_coef: float = 0.05
    """beta: what a nat of divergence from the reference costs, in deviations of the reference's scores."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    eval_prompts: int = 128
    """Prompts to measure on, before and after."""
    output_dir: Path | None = None
    """Where to keep the policy, as a transformers folder; nowhere if not given."""
    seed: int = 1
    """Seeds prompts, sampling and minibatches."""


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two threads collapse when another process runs

    # 1. The environment: prompts, reward model and reference come with its id.
    envs = gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=args.num_envs,
        max_new_tokens=args.max_new_tokens,
        kl_coef=args.kl_coef,
        kl_mode="deferred",  # PPO pays the KL itself, in one batched pass
    )

    # 2. The policy, and a frozen copy of it to measure the divergence from.
    policy = ActorCritic.from_pretrained("tiny")
    reference = policy.reference()
    before = generate(policy, envs, range(args.eval_prompts), args.seed)

    # 3. PPO.
    agent = PPO(
        policy,
        envs,
        PPOConfig(episodes_per_update=args.num_envs, learning_rate=args.learning_rate, seed=args.seed),
    )

    def report(agent: PPO, metrics: dict[str, float]) -> None:
        print(
            f"episode {metrics['episodes']:5.0f}  score {metrics['objective/scores']:+.2f}  "
            f"KL {metrics['objective/kl']:5.2f}  tokens {metrics['val/response_tokens']:.1f}"
        )

    agent.learn(args.total_episodes, [report])

    # 4. Before and after, on the same prompts and seeds.
    after = generate(policy, envs, range(args.eval_prompts), args.seed)
    figures = {"before": measure(before, reference), "after": measure(after, reference)}
    Console().print(figures_table(f"{args.eval_prompts} prompts", figures))
    for first, last in zip(before.transcripts[:5], after.transcripts, strict=False):
        print(f"\n{first['prompt']}\n  before:{first['completion']}\n  after: {last['completion']}")
    if args.output_dir is not None:
        policy.save_pretrained(args.output_dir, envs.unwrapped.tokenizer)
        print(f"\nthe policy is in {args.output_dir}: AutoModelForCausalLM.from_pretrained opens it")


if __name__ == "__main__":
    main(tyro.cli(Args))
