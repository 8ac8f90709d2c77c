"""Stock sb3-contrib MaskablePPO with a top-p mask of the policy (NLPO), in two minutes on one CPU thread.

    python examples/sb3_maskable_ppo.py

The mask comes from the policy of up to ten updates ago, and applies to the reference as well.
"""

from dataclasses import dataclass

import torch
import tyro
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy

from textgym import sb3


@dataclass
class Args:
    total_timesteps: int = 61_440
    n_envs: int = 32


def main(args: Args) -> None:
    torch.set_num_threads(1)
    env = sb3.make_vec_env("textgym/Sentiment-v0", args.n_envs, min_new_tokens=24, action_mask=sb3.TopPMask("tiny"))
    model = MaskablePPO(sb3.MaskableTextActorCriticPolicy, env, n_steps=24, batch_size=24 * args.n_envs, n_epochs=2,
                        gamma=1.0, learning_rate=1e-4, policy_kwargs={"model": "tiny"}, seed=0, verbose=1,
                        rollout_buffer_class=sb3.MaskableEpisodeRolloutBuffer,
                        rollout_buffer_kwargs={"reference": "tiny", "kl_coef": 0.1})  # fmt: skip
    before, _ = evaluate_policy(model, env, n_eval_episodes=8 * args.n_envs, deterministic=False)
    model.learn(args.total_timesteps, callback=[sb3.KLCallback(), sb3.MaskRefreshCallback(10)], log_interval=16)
    after, _ = evaluate_policy(model, env, n_eval_episodes=8 * args.n_envs, deterministic=False)
    for transcript in env.get_attr("transcript")[:5]:
        print(f"{transcript['prompt']} >{transcript['completion']}")
    print(f"before {before:+.2f}, after {after:+.2f}, KL {sum(kl := model.rollout_buffer.episode_kl) / len(kl):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
