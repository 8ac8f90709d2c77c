"""Text generation through the plain Gymnasium API: one row by `gym.make`, then many rows by `gym.make_vec`.

    python examples/gym_make.py
    python examples/gym_make.py --episodes 5 --temperature 0.7

It writes with the embedded language model and trains nothing. For training see ppo_sentiment.py and custom_reward.py.
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
    """Who writes: 'tiny', 'smollm2', a hub id or a path."""
    episodes: int = 3
    """Episodes to write one by one."""
    num_envs: int = 16
    """Rows of the vector environment."""
    temperature: float = 1.0
    """Divides the logits; below 1 the model plays safe."""
    seed: int = 1
    """Seeds the prompts and the sampling."""


def main(args: Args) -> None:
    torch.set_num_threads(1)  # two threads collapse when another process runs
    policy = ActorCritic.from_pretrained(args.model, temperature=args.temperature)
    policy.seed(args.seed)

    # One row. The state is the context, an action is a token, and the score is paid with the last token.
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

    # Many rows in one batch. The step after an end resets the row and ignores its action: Gymnasium's default.
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
