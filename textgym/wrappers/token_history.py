"""TokenHistory: a window of the last tokens as the observation."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from textgym.envs.interface import TextProperties
from textgym.wrappers.views import VectorObservationView, View, check_tokens_are_seen


class TokenHistory(View, gym.utils.RecordConstructorArgs):
    """Wrapper that returns the last n tokens as the observation, for agents that embed a window of tokens.

    The observation space is `Dict(input_ids=Box(0, V-1, (n,), int64), attention_mask=Box(0, 1, (n,), int64))`. The
    newest token is always last; texts shorter than n are padded on the left. Do not use it with language models, which
    need the whole, right-padded observation.

    Args:
        env: A `TextEnv`, with wrappers that do not change its observations.
        n: Width of the window.

    Raises:
        ValueError: If n is below 1, or the observations are not tokens.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import TokenHistory
    >>> env = TokenHistory(gym.make("textgym/Sentiment-v0"), n=3)
    >>> observation, info = env.reset(seed=0)
    >>> env.step(9)[0]["input_ids"][-1], env.step(10)[0]["input_ids"][1:].tolist()
    (np.int64(9), [9, 10])
    """

    def __init__(self, env: gym.Env[Any, Any], n: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, n=n)
        super().__init__(env)
        check_tokens_are_seen(env, "TokenHistory")
        self.observation_space = window_space(self.base_env, n)
        self.n = n

    def observe(self, observation: Any) -> dict[str, np.ndarray]:
        """Return the window, `(n,)` per key."""
        batch = {key: torch.as_tensor(value)[None] for key, value in observation.items()}
        return {key: value[0].numpy() for key, value in window(batch, self.n, self.base_env).items()}


class VectorTokenHistory(VectorObservationView):
    """Version of `TokenHistory` for a `TextVectorEnv`.

    >>> import gymnasium as gym, textgym
    >>> from textgym.wrappers import VectorTokenHistory
    >>> envs = VectorTokenHistory(gym.make_vec("textgym/Sentiment-v0", num_envs=2), n=3)
    >>> observations, infos = envs.reset(seed=0)
    >>> envs.step([9, 10])[0]["input_ids"][:, -1].tolist()
    [9, 10]
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], n: int) -> None:
        super().__init__(env)
        check_tokens_are_seen(env, "VectorTokenHistory")
        self.single_observation_space = window_space(self.base_env, n)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.n = n

    def observe(self, observation: Any) -> dict[str, Any]:
        """Return the windows, `(B, n)` per key."""
        batch = {key: torch.as_tensor(value) for key, value in observation.items()}
        return {key: self.out(value) for key, value in window(batch, self.n, self.base_env).items()}


def window(observation: dict[str, torch.Tensor], n: int, base_env: TextProperties) -> dict[str, torch.Tensor]:
    """Return the last n tokens of each row."""
    # From lengths and not from ids, because a policy may sample the padding token.
    ids, lengths = observation["input_ids"], observation["attention_mask"].sum(-1, keepdim=True)
    slots = lengths - n + torch.arange(n, device=ids.device)  # (B, n), negative before the text
    real = slots >= 0
    picked = ids.gather(1, slots.clamp(min=0))
    return {"input_ids": torch.where(real, picked, base_env.pad_token_id), "attention_mask": real.long()}


def window_space(base_env: TextProperties, n: int) -> gym.spaces.Dict:
    """Return the observation space of windows of n tokens."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return gym.spaces.Dict(
        {
            "input_ids": gym.spaces.Box(0, base_env.vocab_size - 1, (n,), np.int64),
            "attention_mask": gym.spaces.Box(0, 1, (n,), np.int64),
        }
    )
