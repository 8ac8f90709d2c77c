"""PPO of TorchRL with small networks on textgym/SentimentMLP-v0, in a minute on one CPU thread.

    python examples/torchrl_ppo.py

The agent reads the reference's hidden state and chooses one of its 32 most likely tokens. Needs `pip install torchrl`.
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
    total_timesteps: int = 40_960
    num_envs: int = 32
    eval_episodes: int = 256


def main(args: Args) -> tuple[Played, Played]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = GymWrapper(gym.make_vec(ID, args.num_envs, autoreset_mode="Disabled"), categorical_action_encoding=True)
    env.set_seed(0)
    body = TensorDictModule(MLP(192, 32, num_cells=[64, 64]), ["observation"], ["logits"])
    actor = ProbabilisticActor(body, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    critic = ValueOperator(MLP(192, 1, num_cells=[64, 64]), in_keys=["observation"])
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    before = play(ID, lambda seen: actor(TensorDict(observation=seen))["action"], args.eval_episodes)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for batch in Collector(env, actor, frames_per_batch=8 * args.num_envs, total_frames=args.total_timesteps):
        data = advantage(batch).reshape(-1)
        for rows in (part for _ in range(4) for part in torch.randperm(len(data)).split(128)):
            values = loss(data[rows])
            optimizer.zero_grad()
            (values["loss_objective"] + values["loss_critic"] + values["loss_entropy"]).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
    after = play(ID, lambda seen: actor(TensorDict(observation=seen))["action"], args.eval_episodes)
    print(f"score before {before}, after {after}")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Args))
