"""PPO of TorchRL with small networks on textgym/SentimentMLP-v0, in a minute on one CPU thread.

    python examples/torchrl_ppo.py

The agent reads the reference's hidden state and chooses among the 32 tokens that it finds likeliest; TorchRL takes the
vector form of the environment. Needs `pip install torchrl`.
"""

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from textgym.testing import Played, play

ID = "textgym/SentimentMLP-v0"


@dataclass
class Args:
    total_timesteps: int = 20_480
    num_envs: int = 16
    frames_per_batch: int = 1024
    eval_episodes: int = 256


def main(args: Args) -> tuple[Played, Played]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    envs = gym.make_vec(ID, num_envs=args.num_envs, autoreset_mode="Disabled")
    env = GymWrapper(envs, categorical_action_encoding=True)
    env.set_seed(0)
    network = MLP(out_features=int(envs.single_action_space.n), num_cells=[64, 64], activation_class=torch.nn.Tanh)
    body = TensorDictModule(network, ["observation"], ["logits"])
    actor = ProbabilisticActor(body, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    critic = ValueOperator(MLP(out_features=1, num_cells=[64, 64]), in_keys=["observation"])
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    act = lambda observations: actor(TensorDict(observation=observations))["action"].detach()  # noqa: E731
    before = play(ID, act, args.eval_episodes)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for batch in Collector(env, actor, frames_per_batch=args.frames_per_batch, total_frames=args.total_timesteps):
        for _ in range(4):
            data = advantage(batch).reshape(-1)
            for rows in torch.randperm(len(data)).split(256):
                values = loss(data[rows])
                optimizer.zero_grad()
                sum(values[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
    after = play(ID, act, args.eval_episodes)
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
