"""Generate text with the plain Gymnasium API: one episode at a time with `gym.make`, and batches with `gym.make_vec`.

    python examples/gym_make.py
    python examples/gym_make.py --episodes 5 --temperature 0.7

It generates with the embedded language model and trains nothing. For training see ppo_sentiment.py and
custom_reward.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro

import textgym  # noqa: F401  (registers the ids)
from textgym import ActorCritic


@dataclass
class Args:
    env_id: str = "textgym/Sentiment-v0"
    """Id of the environment."""
    model: str = "tiny"
    """Language model: 'tiny', 'smollm2', a hub id or a path."""
    episodes: int = 3
    """Number of episodes with `gym.make`."""
    num_envs: int = 16
    """Number of rows of the vector environment."""
    temperature: float = 1.0
    """Divisor of the logits; below 1 likely tokens become more likely."""
    seed: int = 1
    """Seed of prompts and sampling."""


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two OpenMP threads become very slow if another process runs
    policy = ActorCritic.from_pretrained(args.model, temperature=args.temperature)
    policy.seed(args.seed)

    # One row. The state is the context, an action is a token, and the score is part of the last token's reward.
    env = gym.make(args.env_id, tokenizer=args.model, reference=args.model)
    print(f"{args.env_id}: {env.action_space}, observations of {env.observation_space['input_ids'].shape[0]} slots\n")
    observation, info = env.reset(seed=args.seed)
    for _ in range(args.episodes):
        episode_return, done = 0.0, False
        while not done:
            action = int(policy.act(observation).action)
            observation, reward, terminated, truncated, info = env.step(action)
            episode_return += reward
            done = terminated or truncated
        transcript = env.unwrapped.transcript
        print(f"{transcript['prompt']} |{transcript['completion']}")
        print(f"  score {info['score']:+.2f}, KL term {info['kl_reward']:+.2f}, return {episode_return:+.2f}")
        print(f"  {info['response_tokens']} tokens, {'ended by itself' if info['ended_by_stop'] else 'cut off'}\n")
        observation, info = env.reset()

    # Many rows in one batch. The step after the end of an episode resets the row and ignores its action, which is
    # Gymnasium's default autoreset mode.
    envs = gym.make_vec(args.env_id, num_envs=args.num_envs, tokenizer=args.model, reference=args.model)
    observations, infos = envs.reset(seed=args.seed)
    scores: list[float] = []
    while len(scores) < 2 * args.num_envs:
        observations, *_, infos = envs.step(policy.act(observations).action)
        if "score" in infos:
            scores += infos["score"][infos["_score"]].tolist()
    print(f"{len(scores)} episodes in {args.num_envs} rows: mean score {sum(scores) / len(scores):+.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
