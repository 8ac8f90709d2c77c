"""Registers the environments with Gymnasium; done by `import textgym`."""

from __future__ import annotations

import gymnasium as gym

ENTRY_POINTS = {
    "textgym/Text-v0": ("textgym.envs.text:TextEnv", "textgym.envs.vector:TextVectorEnv"),
    "textgym/Sentiment-v0": (
        "textgym.envs.tasks.sentiment:SentimentEnv",
        "textgym.envs.tasks.sentiment:SentimentVectorEnv",
    ),
    "textgym/SentimentMLP-v0": (
        "textgym.wrappers.sentiment_mlp:sentiment_mlp",
        "textgym.wrappers.sentiment_mlp:sentiment_mlp_vector",
    ),
}


def register_environments() -> None:
    """Makes the ids known to `gymnasium.make` and `gymnasium.make_vec`; a second call changes nothing."""
    for env_id, (entry_point, vector_entry_point) in ENTRY_POINTS.items():
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=entry_point, vector_entry_point=vector_entry_point)
