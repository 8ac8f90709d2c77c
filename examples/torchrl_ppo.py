"""PPO of TorchRL with small networks on textgym/SentimentMLP-v0, in two minutes on one CPU thread.

    python examples/torchrl_ppo.py

The agent reads the reference's hidden state and chooses among the 32 tokens that it finds likeliest.
Needs `pip install torchrl`.
"""

from dataclasses import dataclass

import torch
import tyro
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, RewardSum, SerialEnv, TransformedEnv
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import textgym  # noqa: F401  (registers the environments)


@dataclass
class Args:
    total_timesteps: int = 20_000
    num_envs: int = 16
    frames_per_batch: int = 1024


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = TransformedEnv(SerialEnv(args.num_envs, lambda: GymEnv("textgym/SentimentMLP-v0")), RewardSum())
    env.set_seed(0)
    actions, features = env.action_spec.shape[-1], env.observation_spec["observation"].shape[-1]
    network = MLP(in_features=features, out_features=actions, num_cells=[64, 64], activation_class=torch.nn.Tanh)
    actor = ProbabilisticActor(TensorDictModule(network, ["observation"], ["logits"]), in_keys=["logits"],
                               distribution_class=OneHotCategorical, return_log_prob=True)  # fmt: skip
    critic = ValueOperator(MLP(in_features=features, out_features=1, num_cells=[64, 64]), in_keys=["observation"])
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01, normalize_advantage=True)
    optimizer, returns = torch.optim.Adam(loss.parameters(), lr=1e-3), []
    collector = Collector(env, actor, frames_per_batch=args.frames_per_batch, total_frames=args.total_timesteps)
    for batch in collector:
        following = batch["next"]
        returns.append(following["episode_reward"][following["done"]].mean().item())
        for _ in range(4):
            data = advantage(batch).reshape(-1)
            for rows in torch.randperm(len(data)).split(256):
                values = loss(data[rows])
                optimizer.zero_grad()
                sum(values[name] for name in ("loss_objective", "loss_critic", "loss_entropy")).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
    collector.shutdown()
    print(f"return before {returns[0]:+.2f}, after {returns[-1]:+.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
