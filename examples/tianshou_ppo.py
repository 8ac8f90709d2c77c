"""PPO of Tianshou 2 with small networks on textgym/SentimentMLP-v0, in two minutes on one CPU thread.

    python examples/tianshou_ppo.py

The agent reads the reference's hidden state and chooses among the 32 tokens that it finds likeliest.
Needs `pip install tianshou`.
"""

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

import textgym  # noqa: F401  (registers the environments)


@dataclass
class Args:
    total_timesteps: int = 20_000
    num_envs: int = 16
    eval_episodes: int = 64


class WithoutInfos(gym.Wrapper):
    """Infos hold NaN where a figure is unknown, such as the exact KL; Tianshou stores them and takes NaN for a bug."""

    def step(self, action):
        return *self.env.step(action)[:4], {}


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = gym.make("textgym/SentimentMLP-v0")
    features, actions = env.observation_space.shape, env.action_space.n
    envs = DummyVectorEnv([lambda: WithoutInfos(gym.make("textgym/SentimentMLP-v0"))] * args.num_envs)
    envs.seed(0)
    actor, critic = (Net(state_shape=features, hidden_sizes=[64, 64], activation=torch.nn.Tanh) for _ in range(2))
    policy = ProbabilisticActorPolicy(
        actor=DiscreteActor(preprocess_net=actor, action_shape=actions, softmax_output=False),
        dist_fn=lambda logits: torch.distributions.Categorical(logits=logits),
        action_space=env.action_space,
        action_scaling=False,
        action_bound_method=None,
    )
    algorithm = PPO(policy=policy, critic=DiscreteCritic(preprocess_net=critic), optim=AdamOptimizerFactory(lr=1e-3),
                    gamma=1.0, ent_coef=0.01, max_grad_norm=0.5)  # fmt: skip
    before = score(policy, envs, args.eval_episodes)
    collector = Collector(policy, envs, VectorReplayBuffer(8192, args.num_envs))
    params = OnPolicyTrainerParams(training_collector=collector, max_epochs=1, epoch_num_steps=args.total_timesteps,
                                   collection_step_num_env_steps=min(1024, args.total_timesteps), batch_size=256,
                                   update_step_num_repetitions=4, show_progress=False)  # fmt: skip
    algorithm.run_training(params)
    print(f"return before {before:+.2f}, after {score(policy, envs, args.eval_episodes):+.2f}")


def score(policy: ProbabilisticActorPolicy, envs: DummyVectorEnv, episodes: int) -> float:
    return float(Collector(policy, envs).collect(n_episode=episodes, reset_before_collect=True).returns.mean())


if __name__ == "__main__":
    main(tyro.cli(Args))
