"""Stock sb3-contrib QRDQN trains the embedded language model, in two minutes on one CPU thread.

    python examples/sb3_qrdqn.py

Like DQN, but it predicts 32 quantiles of the return for each token.
"""

from dataclasses import dataclass

import torch
import tyro
from sb3_contrib import QRDQN
from stable_baselines3.common.evaluation import evaluate_policy

from textgym.sb3 import EpisodeReplayBuffer, KLCallback, TextQuantilePolicy, make_vec_env


@dataclass
class Args:
    total_timesteps: int = 30_000
    n_envs: int = 16


def main(args: Args) -> None:
    torch.set_num_threads(1)
    env = make_vec_env("textgym/Sentiment-v0", n_envs=args.n_envs, kl_mode="reference", kl_coef=0.01)
    model = QRDQN(TextQuantilePolicy, env, learning_rate=1e-4, buffer_size=50_000, learning_starts=1000, batch_size=256,
                  gamma=1.0, train_freq=8, gradient_steps=2, target_update_interval=1000, exploration_fraction=0.5,
                  policy_kwargs={"model": "tiny"}, replay_buffer_class=EpisodeReplayBuffer,
                  replay_buffer_kwargs={"n_steps": 24}, seed=0)  # fmt: skip
    before, _ = evaluate_policy(model, env, n_eval_episodes=16 * args.n_envs)
    model.learn(args.total_timesteps, callback=KLCallback(), log_interval=200)
    after, _ = evaluate_policy(model, env, n_eval_episodes=16 * args.n_envs)
    for transcript in env.get_attr("transcript")[:5]:
        print(f"{transcript['prompt']} >{transcript['completion']}")
    print(f"greedy return before {before:+.2f}, after {after:+.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
