"""Stock Stable-Baselines3 PPO trains the embedded language model, in two minutes on one CPU thread.

    python examples/sb3_ppo.py

The buffer applies the KL penalty, and evaluates all states of a text in one forward pass.
"""

from dataclasses import dataclass

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from textgym.sb3 import EpisodeRolloutBuffer, KLCallback, TextActorCriticPolicy, make_vec_env


@dataclass
class Args:
    total_timesteps: int = 73_728
    n_envs: int = 32


def main(args: Args) -> None:
    torch.set_num_threads(1)
    env = make_vec_env("textgym/Sentiment-v0", n_envs=args.n_envs)
    model = PPO(TextActorCriticPolicy, env, n_steps=24, batch_size=24 * args.n_envs, n_epochs=2, learning_rate=1e-4,
                gamma=1.0, policy_kwargs={"model": "tiny"}, rollout_buffer_class=EpisodeRolloutBuffer,
                rollout_buffer_kwargs={"reference": "tiny", "kl_coef": 0.07}, seed=0, verbose=1)  # fmt: skip
    before, _ = evaluate_policy(model, env, n_eval_episodes=8 * args.n_envs, deterministic=False)
    model.learn(args.total_timesteps, callback=KLCallback(), log_interval=16)
    after, _ = evaluate_policy(model, env, n_eval_episodes=8 * args.n_envs, deterministic=False)
    for transcript in env.get_attr("transcript")[:5]:
        print(f"{transcript['prompt']} >{transcript['completion']}")
    print(f"before {before:+.2f}, after {after:+.2f}, KL {sum(kl := model.rollout_buffer.episode_kl) / len(kl):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
