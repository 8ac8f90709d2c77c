"""Unmodified Stable-Baselines3 and sb3-contrib algorithms on text environments, with one forward pass per sequence.

>>> from stable_baselines3 import PPO
>>> from textgym.sb3 import EpisodeRolloutBuffer, TextActorCriticPolicy, make_vec_env
>>> env = make_vec_env("textgym/Sentiment-v0", n_envs=4, max_new_tokens=4)
>>> model = PPO(TextActorCriticPolicy, env, n_steps=8, batch_size=32, gamma=1.0, policy_kwargs={"model": "tiny"},
...             rollout_buffer_class=EpisodeRolloutBuffer,
...             rollout_buffer_kwargs={"reference": "tiny", "kl_coef": 0.05})
>>> model.learn(32).num_timesteps
32
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textgym.lazy import on_first_use

if TYPE_CHECKING:
    from textgym.models.distributions.masks import TopKMask, TopPMask
    from textgym.sb3.callbacks import KLCallback, MaskRefreshCallback, SyncReferenceCallback
    from textgym.sb3.maskable import MaskableEpisodeRolloutBuffer, MaskableTextActorCriticPolicy
    from textgym.sb3.policies import TextActorCriticPolicy
    from textgym.sb3.q_policies import TextQPolicy
    from textgym.sb3.quantile import TextQuantilePolicy
    from textgym.sb3.replay_buffer import EpisodeReplayBuffer
    from textgym.sb3.rollout_buffer import EpisodeRolloutBuffer
    from textgym.sb3.vec_env import TextVecEnv, make_vec_env

__all__ = [
    "EpisodeReplayBuffer",
    "EpisodeRolloutBuffer",
    "KLCallback",
    "MaskRefreshCallback",
    "MaskableEpisodeRolloutBuffer",
    "MaskableTextActorCriticPolicy",
    "SyncReferenceCallback",
    "TextActorCriticPolicy",
    "TextQPolicy",
    "TextQuantilePolicy",
    "TextVecEnv",
    "TopKMask",
    "TopPMask",
    "make_vec_env",
]

# Imported on first use, so that only sb3-contrib's algorithms need sb3-contrib.
__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "EpisodeReplayBuffer": ".replay_buffer",
        "EpisodeRolloutBuffer": ".rollout_buffer",
        "KLCallback": ".callbacks",
        "MaskRefreshCallback": ".callbacks",
        "MaskableEpisodeRolloutBuffer": ".maskable",
        "MaskableTextActorCriticPolicy": ".maskable",
        "SyncReferenceCallback": ".callbacks",
        "TextActorCriticPolicy": ".policies",
        "TextQPolicy": ".q_policies",
        "TextQuantilePolicy": ".quantile",
        "TextVecEnv": ".vec_env",
        "TopKMask": "textgym.models.distributions.masks",
        "TopPMask": "textgym.models.distributions.masks",
        "make_vec_env": ".vec_env",
    },
)
