"""PPO on rewards of your own: Python functions of the texts. Here, sentences of a wanted number of words.

    python examples/custom_reward.py
    python examples/custom_reward.py --words 10 --total-episodes 2048

A reward function takes what it needs by name: `prompts`, `completions`, `prompt_ids`, `completion_ids`, and any column
of the prompts. It returns one number for each completion, one for each token of each completion, or `None` where it has
nothing to say. It may be `async`, and log figures of its own.
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


def repeats(completion_ids: list[list[int]]) -> list[list[float]]:
    """Token by token: -1 for each token that the completion has had before. The credit goes where it belongs."""
    return [[-1.0 if token in ids[:place] else 0.0 for place, token in enumerate(ids)] for ids in completion_ids]


async def full_stop(completions: list[str], log_metric: Callable[[str, float], None]) -> list[float | None]:
    """Whether a completion ends like a sentence; nothing to say of an empty one.

    An `async` function may wait for a service: those of one batch wait beside each other, each `reward_timeout` long.
    """
    await asyncio.sleep(0.001)  # stands for the service
    log_metric("empty", sum(not text for text in completions) / len(completions))
    return [float(text.endswith((".", "!", "?"))) if text else None for text in completions]


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two threads collapse when another process runs

    # A function that breaks on an empty text would say so here, and not in the middle of the night.
    assert check_reward(word_count, {"words": 5}) == []

    # The prompts are rows with a column of their own, which the reward function asks for by name.
    prompts = [{"prompt": row["prompt"], "words": args.words} for row in load_prompts("openings")]
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=args.num_envs,
        prompts=prompts,
        tokenizer="tiny",
        reward=[word_count, repeats, full_stop, RepetitionPenalty(2)],
        reward_weights=[0.2, 0.1, 0.5, 0.0],  # weight 0: reported, not paid
        reward_timeout=10.0,
        on_reward_error="skip",  # a service that fails now and then is counted, and does not end the run
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
