"""PPO of sbx (Stable-Baselines3 in JAX) with its default MlpPolicy on textgym/SentimentMLP-v0, in a minute.

    python examples/sbx_ppo.py

The agent reads the reference's hidden state and chooses one of its 32 most likely tokens.
Needs `pip install sbx-rl`.
"""

from dataclasses import dataclass

import torch
import tyro
from sbx import PPO

from textgym.sb3 import make_vec_env
from textgym.testing import Played, play

ID = "textgym/SentimentMLP-v0"


@dataclass
class Args:
    total_timesteps: int = 40_960
    num_envs: int = 32
    eval_episodes: int = 256


def main(args: Args) -> tuple[Played, Played]:
    torch.set_num_threads(1)
    env = make_vec_env(ID, n_envs=args.num_envs)
    model = PPO(
        "MlpPolicy", env, n_steps=8, batch_size=128, n_epochs=4, learning_rate=1e-3, gamma=1.0, ent_coef=0.01, seed=0
    )
    before = play(ID, lambda observations: model.predict(observations, deterministic=False)[0], args.eval_episodes)
    model.learn(args.total_timesteps)
    after = play(ID, lambda observations: model.predict(observations, deterministic=False)[0], args.eval_episodes)
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
