"""PPO of Tianshou 2 with small networks on textgym/SentimentMLP-v0, in four minutes on one CPU thread.

    python examples/tianshou_ppo.py

The agent reads the reference's hidden state and chooses one of its 32 most likely tokens.
Needs `pip install tianshou`.
"""

from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import torch
import tyro
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

from textgym.testing import Played, play

ID = "textgym/SentimentMLP-v0"


@dataclass
class Args:
    total_timesteps: int = 40_960
    num_envs: int = 32
    eval_episodes: int = 256


def main(args: Args) -> tuple[Played, Played]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    envs = DummyVectorEnv([partial(gym.make, ID)] * args.num_envs)
    envs.seed(0)
    observations, actions = (env := gym.make(ID)).observation_space, env.action_space
    body = partial(Net, state_shape=observations.shape, hidden_sizes=[64, 64], activation=torch.nn.Tanh)
    actor = DiscreteActor(preprocess_net=body(), action_shape=actions.n, softmax_output=False)
    policy = DiscreteActorPolicy(actor=actor, action_space=actions)
    critic, optim = DiscreteCritic(preprocess_net=body()), AdamOptimizerFactory(lr=1e-3)
    algorithm = PPO(policy=policy, critic=critic, optim=optim, gamma=1.0, ent_coef=0.01, max_grad_norm=0.5)
    collector = Collector(policy, envs, VectorReplayBuffer(8192, args.num_envs))
    params = OnPolicyTrainerParams(training_collector=collector, max_epochs=1, epoch_num_steps=args.total_timesteps)
    params.batch_size, params.update_step_num_repetitions, params.show_progress = 128, 4, False
    params.collection_step_num_env_steps = 8 * args.num_envs
    before = play(ID, lambda observations: policy(Batch(obs=observations, info={})).act, args.eval_episodes)
    algorithm.run_training(params)
    after = play(ID, lambda observations: policy(Batch(obs=observations, info={})).act, args.eval_episodes)
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
