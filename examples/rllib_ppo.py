"""PPO of RLlib (new API stack) with its default network on textgym/SentimentMLP-v0, in minutes on one CPU.

    python examples/rllib_ppo.py
    python examples/rllib_ppo.py --num-env-runners 2      # on Ray workers; with 0 episodes run in this process

The agent reads the reference's hidden state and chooses one of its 32 most likely tokens; RLlib takes the
vector form of the environment. Needs `pip install ray dm-tree lz4 ormsgpack pyarrow scipy tensorboardX`, which is
`"ray[rllib]"` without its pin of an older Gymnasium.
"""

from dataclasses import dataclass

import gymnasium as gym
import ray
import torch
import tyro
from ray.rllib.algorithms.ppo import PPOConfig

from textgym.testing import Played, play

ID = "textgym/SentimentMLP-v0"


@dataclass
class Args:
    total_timesteps: int = 122_880
    num_env_runners: int = 0
    num_envs: int = 32
    train_batch_size: int = 256
    eval_episodes: int = 256


def main(args: Args) -> tuple[Played, Played]:
    ray.init(num_cpus=1 + args.num_env_runners, include_dashboard=False, log_to_driver=False)
    vector = gym.VectorizeMode.VECTOR_ENTRY_POINT
    config = PPOConfig().environment(f"textgym:{ID}").debugging(seed=0)  # "textgym:" makes workers import it first
    config.env_runners(num_env_runners=args.num_env_runners, num_envs_per_env_runner=args.num_envs)
    config.env_runners(gym_env_vectorize_mode=vector)
    config.training(gamma=1.0, lr=1e-3, train_batch_size_per_learner=args.train_batch_size, minibatch_size=128)
    config.training(num_epochs=4, entropy_coeff=0.01, grad_clip=0.5)
    algorithm = config.build_algo()

    def act(observations):
        with torch.no_grad():
            output = algorithm.get_module().forward_inference({"obs": torch.as_tensor(observations)})
        return torch.distributions.Categorical(logits=output["action_dist_inputs"]).sample()

    before = play(ID, act, args.eval_episodes)
    for _ in range(args.total_timesteps // args.train_batch_size):
        algorithm.train()
    after = play(ID, act, args.eval_episodes)
    algorithm.stop()
    ray.shutdown()
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
