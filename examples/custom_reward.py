"""PPO on a reward of your own: a Python function of the texts. Here, texts of a wanted number of words.

    python examples/custom_reward.py
    python examples/custom_reward.py --words 10 --total-episodes 2048

A reward function takes what it needs by name: `prompts`, `completions`, `prompt_ids`, `completion_ids`, and any column
of the prompts. It returns one number for each completion, or one for each token of each completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro

import textgym  # noqa: F401  (registers the ids)
from textgym import ActorCritic
from textgym.agents import PPO, PPOConfig
from textgym.agents.evaluation import generate
from textgym.data.prompts import load_prompts


@dataclass
class Args:
    words: int = 5
    """How many words a completion should have."""
    total_episodes: int = 1024
    """Episodes that PPO plays."""
    num_envs: int = 32
    """Rows of the environment."""
    max_new_tokens: int = 24
    """Longest completion, in tokens."""
    kl_coef: float = 0.02
    """beta: what a nat of divergence from the reference costs, in reward."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    samples: int = 5
    """Prompts to show before and after."""
    seed: int = 1
    """Seeds prompts, sampling and minibatches."""


def word_count(completions: list[str], words: list[int]) -> list[float]:
    """How far each completion is from its row's number of words, as a negative number."""
    return [-float(abs(len(text.split()) - wanted)) for text, wanted in zip(completions, words, strict=True)]


def full_stop(completions: list[str]) -> list[bool]:
    """Whether a completion ends like a sentence."""
    return [text.endswith((".", "!", "?")) for text in completions]


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two threads collapse when another process runs

    # The prompts are rows with a column of their own, which the reward function asks for by name.
    prompts = [{"prompt": row["prompt"], "words": args.words} for row in load_prompts("openings")]
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=args.num_envs,
        prompts=prompts,
        tokenizer="tiny",
        reward=[word_count, full_stop],
        reward_weights=[0.2, 0.0],  # weight 0: reported, not paid
        reference="tiny",
        kl_coef=args.kl_coef,
        kl_mode="deferred",  # PPO pays the KL itself
        max_prompt_tokens=24,
        max_new_tokens=args.max_new_tokens,
    )
    policy = ActorCritic.from_pretrained("tiny")
    agent = PPO(
        policy,
        envs,
        PPOConfig(episodes_per_update=2 * args.num_envs, learning_rate=args.learning_rate, seed=args.seed),
    )

    def report(agent: PPO, metrics: dict[str, float]) -> None:
        print(
            f"episode {metrics['episodes']:5.0f}  word_count {metrics['rewards/word_count/mean']:+.2f}  "
            f"full_stop {metrics['rewards/full_stop/mean']:.2f}  KL {metrics['objective/kl']:.2f}"
        )

    before = generate(policy, envs, range(args.samples), args.seed)
    agent.learn(args.total_episodes, [report])
    after = generate(policy, envs, range(args.samples), args.seed)

    for first, last in zip(before.transcripts, after.transcripts, strict=True):
        print(f"\n{first['prompt']}\n  before:{first['completion']}\n  after: {last['completion']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
