"""Stock sb3-contrib TRPO trains the embedded language model, in a few minutes on one CPU thread.

    python examples/sb3_trpo.py

TRPO needs second derivatives, so the policy switches to eager attention and warns about it.
"""

from dataclasses import dataclass

import torch
import tyro
from sb3_contrib import TRPO
from stable_baselines3.common.evaluation import evaluate_policy

from textgym.sb3 import EpisodeRolloutBuffer, KLCallback, TextActorCriticPolicy, make_vec_env


@dataclass
class Args:
    total_timesteps: int = 18_432
    n_envs: int = 64


def main(args: Args) -> None:
    torch.set_num_threads(1)
    env = make_vec_env("textgym/Sentiment-v0", n_envs=args.n_envs)
    model = TRPO(TextActorCriticPolicy, env, n_steps=24, batch_size=384, learning_rate=3e-4, gamma=1.0, target_kl=0.3,
                 cg_damping=5.0, cg_max_steps=3, n_critic_updates=4, policy_kwargs={"model": "tiny"},
                 rollout_buffer_class=EpisodeRolloutBuffer,
                 rollout_buffer_kwargs={"reference": "tiny", "kl_coef": 0.05}, seed=0, verbose=1)  # fmt: skip
    before, _ = evaluate_policy(model, env, n_eval_episodes=4 * args.n_envs, deterministic=False)
    model.learn(args.total_timesteps, callback=KLCallback())
    after, _ = evaluate_policy(model, env, n_eval_episodes=4 * args.n_envs, deterministic=False)
    for transcript in env.get_attr("transcript")[:5]:
        print(f"{transcript['prompt']} >{transcript['completion']}")
    print(f"before {before:+.2f}, after {after:+.2f}, KL {sum(kl := model.rollout_buffer.episode_kl) / len(kl):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
