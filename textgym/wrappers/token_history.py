"""TokenHistory: the last tokens alone, in a window of fixed width."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from textgym.envs.text_task import TextTask
from textgym.wrappers.views import VectorObservationView, View, check_tokens_are_seen


class TokenHistory(View, gym.utils.RecordConstructorArgs):
    """The observation is the last n tokens, newest last, for agents that embed a window.

    `Dict(input_ids=Box(0, V-1, (n,), int64), attention_mask=Box(0, 1, (n,), int64))`. The newest token is always in
    the last slot; where the text is shorter than n, padding stands in front. Language models want the whole,
    right-padded observation instead.

    Args:
        env: a `TextEnv`, with wrappers that leave its observations alone.
        n: width of the window.

    Raises:
        ValueError: n below 1, or observations that are no longer tokens.

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
        self.observation_space = window_space(self.task, n)
        self.n = n

    def observe(self, observation: Any) -> dict[str, np.ndarray]:
        """`(n,)` each."""
        batch = {key: torch.as_tensor(value)[None] for key, value in observation.items()}
        return {key: value[0].numpy() for key, value in window(batch, self.n, self.task).items()}


class VectorTokenHistory(VectorObservationView):
    """`TokenHistory` of a `TextVectorEnv`, see there.

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
        self.single_observation_space = window_space(self.task, n)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.n = n

    def observe(self, observation: Any) -> dict[str, Any]:
        """`(B, n)` each."""
        batch = {key: torch.as_tensor(value) for key, value in observation.items()}
        return {key: self.out(value) for key, value in window(batch, self.n, self.task).items()}


def window(observation: dict[str, torch.Tensor], n: int, task: TextTask) -> dict[str, torch.Tensor]:
    """The last n tokens of each row, from the lengths alone."""
    ids, lengths = observation["input_ids"], observation["attention_mask"].sum(-1, keepdim=True)
    slots = lengths - n + torch.arange(n, device=ids.device)  # (B, n)
    real = slots >= 0
    picked = ids.gather(1, slots.clamp(min=0))
    return {"input_ids": torch.where(real, picked, task.episodes.pad_token_id), "attention_mask": real.long()}


def window_space(task: TextTask, n: int) -> gym.spaces.Dict:
    """The space of `window`."""
    if n < 1:
        raise ValueError(f"a window holds at least 1 token, got n={n}")
    return gym.spaces.Dict(
        {
            "input_ids": gym.spaces.Box(0, task.vocab_size - 1, (n,), np.int64),
            "attention_mask": gym.spaces.Box(0, 1, (n,), np.int64),
        }
    )
