"""Train PPO with your own reward functions. Here they reward sentences with a given number of words.

    python examples/custom_reward.py
    python examples/custom_reward.py --words 10 --total-episodes 2048

A reward function declares its arguments by name: `prompts`, `completions`, `prompt_ids`, `completion_ids`, and any
column of the prompts. It returns one number for each completion, or one for each token of each completion, or `None`
for a completion that it cannot score. It may be `async`, and it may log metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro

import textgym  # noqa: F401  (registers the ids)
from textgym import ActorCritic
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.evaluation import generate
from textgym.data.prompts import load_prompts
from textgym.rewards.functions import RepetitionPenalty
from textgym.testing import check_reward


@dataclass
class Args:
    words: int = 5
    """Target number of words in a completion."""
    total_episodes: int = 1024
    """Number of training episodes."""
    num_envs: int = 32
    """Number of rows of the environment."""
    max_new_tokens: int = 24
    """Maximum length of a completion in tokens."""
    kl_coef: float = 0.02
    """beta, the coefficient of the KL penalty, in reward per nat."""
    learning_rate: float = 2e-4
    """Peak learning rate of the policy."""
    critic_learning_rate: float = 3e-4
    """Peak learning rate of the critic."""
    samples: int = 5
    """Number of prompts whose completions are printed before and after training."""
    seed: int = 1
    """Seed of prompts, sampling and minibatches."""


def word_count(completions: list[str], words: list[int]) -> list[float]:
    """Return minus the distance between each completion's number of words and its row's target."""
    return [-float(abs(len(text.split()) - wanted)) for text, wanted in zip(completions, words, strict=True)]


def repeats(completion_ids: list[list[int]]) -> list[list[float]]:
    """Return -1 for each token that occurred earlier in the completion: a dense reward with exact credit assignment."""
    return [[-1.0 if token in ids[:index] else 0.0 for index, token in enumerate(ids)] for ids in completion_ids]


async def full_stop(completions: list[str], log_metric: Callable[[str, float], None]) -> list[float | None]:
    """Return 1 for a completion that ends like a sentence, 0 for any other, and `None` for an empty one.

    An `async` function may call a service. All async functions run concurrently, each for at most `reward_timeout`
    seconds.
    """
    await asyncio.sleep(0.001)  # in place of a call to a service
    log_metric("empty", sum(not text for text in completions) / len(completions))
    return [float(text.endswith((".", "!", "?"))) if text else None for text in completions]


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two OpenMP threads become very slow if another process runs

    # Finds errors before training, for example with empty texts.
    assert check_reward(word_count, {"words": 5}) == []

    # Each prompt has a column `words`, which the reward function takes as an argument.
    prompts = [{"prompt": row["prompt"], "words": args.words} for row in load_prompts("openings")]
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=args.num_envs,
        prompts=prompts,
        tokenizer="tiny",
        reward=[word_count, repeats, full_stop, RepetitionPenalty(2)],
        reward_weights=[0.2, 0.1, 0.5, 0.0],  # weight 0: only a metric
        reward_timeout=10.0,
        on_reward_error="skip",  # errors are counted and do not end the run
        reference="tiny",
        kl_coef=args.kl_coef,
        kl_mode="deferred",  # PPO applies the KL penalty
        max_prompt_tokens=24,
        max_new_tokens=args.max_new_tokens,
    )
    policy = ActorCritic.from_pretrained("tiny", critic="separate")
    config = PPOConfig(
        episodes_per_update=2 * args.num_envs,
        learning_rate=args.learning_rate,
        critic_learning_rate=args.critic_learning_rate,
        seed=args.seed,
    )
    agent = PPO(policy, envs, config)

    def report(agent: PPO, metrics: dict[str, float]) -> None:
        print(
            f"episode {metrics['episodes']:5.0f}  word_count {metrics['rewards/word_count/mean']:+.2f}  "
            f"repeats {metrics['rewards/repeats/mean']:+.2f}  full_stop {metrics['rewards/full_stop/mean']:.2f}  "
            f"failures {metrics['rewards/full_stop/errors']:.0f}  KL {metrics['objective/kl']:.2f}"
        )

    before = generate(policy, envs, range(args.samples), args.seed)
    agent.learn(args.total_episodes, [report])
    after = generate(policy, envs, range(args.samples), args.seed)

    for first, last in zip(before.transcripts, after.transcripts, strict=True):
        print(f"\n{first['prompt']}\n  before:{first['completion']}\n  after: {last['completion']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
