"""Stock Stable-Baselines3 A2C trains the embedded language model, in two minutes on one CPU thread.

    python examples/sb3_a2c.py

Each rollout is used for one optimiser step on all of its tokens.
"""

from dataclasses import dataclass

import torch
import tyro
from stable_baselines3 import A2C
from stable_baselines3.common.evaluation import evaluate_policy

from textgym.sb3 import EpisodeRolloutBuffer, KLCallback, TextActorCriticPolicy, make_vec_env


@dataclass
class Args:
    total_timesteps: int = 81_408
    n_envs: int = 32


def main(args: Args) -> None:
    torch.set_num_threads(1)
    env = make_vec_env("textgym/Sentiment-v0", n_envs=args.n_envs)
    model = A2C(TextActorCriticPolicy, env, n_steps=24, learning_rate=1e-4, gamma=1.0, gae_lambda=0.95,
                normalize_advantage=True, policy_kwargs={"model": "tiny"}, rollout_buffer_class=EpisodeRolloutBuffer,
                rollout_buffer_kwargs={"reference": "tiny", "kl_coef": 0.08}, seed=0, verbose=1)  # fmt: skip
    before, _ = evaluate_policy(model, env, n_eval_episodes=8 * args.n_envs, deterministic=False)
    model.learn(args.total_timesteps, callback=KLCallback(), log_interval=16)
    after, _ = evaluate_policy(model, env, n_eval_episodes=8 * args.n_envs, deterministic=False)
    for transcript in env.get_attr("transcript")[:5]:
        print(f"{transcript['prompt']} >{transcript['completion']}")
    print(f"before {before:+.2f}, after {after:+.2f}, KL {sum(kl := model.rollout_buffer.episode_kl) / len(kl):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
