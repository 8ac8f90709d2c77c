"""PPO, A2C or DQN of Stable-Baselines3 with its default MlpPolicy on textgym/SentimentMLP-v0, in a minute or two.

    python examples/sb3_mlp.py --algorithm DQN

The agent reads the reference's hidden state and chooses one of its 32 most likely tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from stable_baselines3 import A2C, DQN, PPO

from textgym.sb3 import make_vec_env
from textgym.testing import Played, play

ID = "textgym/SentimentMLP-v0"
ALGORITHMS = {
    "PPO": partial(PPO, n_steps=8, batch_size=256, learning_rate=1e-3, ent_coef=0.01),
    "A2C": partial(A2C, n_steps=4, learning_rate=2e-3, gae_lambda=0.95, ent_coef=0.01, normalize_advantage=True),
    "DQN": partial(DQN, gradient_steps=32, learning_rate=1e-3, learning_starts=1000, target_update_interval=500),
}


@dataclass
class Args:
    algorithm: Literal["PPO", "A2C", "DQN"] = "PPO"
    total_timesteps: int = 40_960
    num_envs: int = 32
    eval_episodes: int = 256


def main(args: Args) -> tuple[Played, Played]:
    torch.set_num_threads(1)
    env = make_vec_env(ID, n_envs=args.num_envs)
    model = ALGORITHMS[args.algorithm]("MlpPolicy", env, gamma=1.0, seed=0)
    greedy = args.algorithm == "DQN"
    before = play(ID, lambda observations: model.predict(observations, deterministic=greedy)[0], args.eval_episodes)
    model.learn(args.total_timesteps)
    after = play(ID, lambda observations: model.predict(observations, deterministic=greedy)[0], args.eval_episodes)
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
