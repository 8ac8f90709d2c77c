"""Train token-level PPO against a learned reward model. All models are embedded: no download, under a minute on a CPU.

    python examples/ppo_sentiment.py
    python examples/ppo_sentiment.py --total-episodes 6144 --kl-coef 0.02 --output-dir runs/sentiment

Left out, see `make demo`: real prompts, training of the reward model, and an independent judge.
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
    """Number of training episodes."""
    num_envs: int = 64
    """Number of rows of the environment; each update collects one episode in every row."""
    max_new_tokens: int = 24
    """Maximum length of a completion in tokens."""
    kl_coef: float = 0.05
    """beta, the coefficient of the KL penalty, in standard deviations of the reference's scores per nat."""
    learning_rate: float = 1e-4
    """Peak learning rate; that of the critic is three times as high."""
    eval_prompts: int = 128
    """Number of prompts for the evaluation before and after training."""
    output_dir: Path | None = None
    """Folder for the trained policy, in transformers' format; by default it is not saved."""
    seed: int = 1
    """Seed of prompts, sampling and minibatches."""


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two OpenMP threads become very slow if another process runs

    # 1. The environment. Its id has default prompts, a default reward model and a default reference.
    envs = gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=args.num_envs,
        max_new_tokens=args.max_new_tokens,
        kl_coef=args.kl_coef,
        kl_mode="deferred",  # PPO applies the KL penalty, with one batched pass of the reference
    )

    # 2. The policy, and a frozen copy of it as the reference of the KL.
    policy = ActorCritic.from_pretrained("tiny", critic="separate")
    reference = policy.reference()
    before = generate(policy, envs, range(args.eval_prompts), args.seed)

    # 3. PPO.
    config = PPOConfig(
        episodes_per_update=args.num_envs,
        learning_rate=args.learning_rate,
        critic_learning_rate=3 * args.learning_rate,
        seed=args.seed,
    )
    agent = PPO(policy, envs, config)

    def report(agent: PPO, metrics: dict[str, float]) -> None:
        print(
            f"episode {metrics['episodes']:5.0f}  score {metrics['objective/scores']:+.2f}  "
            f"KL {metrics['objective/kl']:5.2f}  tokens {metrics['val/response_tokens']:.1f}"
        )

    agent.learn(args.total_episodes, [report])

    # 4. Evaluation on the same prompts and seeds as before training.
    after = generate(policy, envs, range(args.eval_prompts), args.seed)
    metrics = {"before": measure(before, reference), "after": measure(after, reference)}
    Console().print(figures_table(f"{args.eval_prompts} prompts", metrics))
    for first, last in zip(before.transcripts[:5], after.transcripts, strict=False):
        print(f"\n{first['prompt']}\n  before:{first['completion']}\n  after: {last['completion']}")
    if args.output_dir is not None:
        policy.save_pretrained(args.output_dir, envs.unwrapped.tokenizer, overwrite=True)
        print(f"\nthe policy is in {args.output_dir}: AutoModelForCausalLM.from_pretrained opens it")


if __name__ == "__main__":
    main(tyro.cli(Args))
