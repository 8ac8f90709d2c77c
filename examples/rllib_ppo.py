"""PPO of RLlib (new API stack) with its default network on textgym/SentimentMLP-v0, in minutes on one CPU.

    python examples/rllib_ppo.py

The agent reads the reference's hidden state and chooses among the 32 tokens that it finds likeliest; RLlib takes the
vector form of the environment. Needs `pip install "ray[rllib]"`.
"""

from dataclasses import dataclass

import gymnasium as gym
import ray
import tyro
from ray.rllib.algorithms.ppo import PPOConfig

import textgym  # noqa: F401  (registers the environments)


@dataclass
class Args:
    iterations: int = 20
    num_envs: int = 16
    train_batch_size: int = 1024


def main(args: Args) -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    config = (
        PPOConfig()
        .environment("textgym/SentimentMLP-v0")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=args.num_envs,
                     gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT)
        .training(gamma=1.0, lr=1e-3, train_batch_size_per_learner=args.train_batch_size, minibatch_size=256,
                  num_epochs=4, entropy_coeff=0.01, grad_clip=0.5)
        .debugging(seed=0)
    )  # fmt: skip
    algorithm = config.build_algo()
    returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(args.iterations)]
    algorithm.stop()
    ray.shutdown()
    print(f"return before {returns[0]:+.2f}, after {returns[-1]:+.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
