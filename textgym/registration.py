"""Registers the environments with Gymnasium; done by `import textgym`."""

from __future__ import annotations

import gymnasium as gym

TASKS = {
    "Sentiment": "sentiment",
    "Copy": "copying",
    "IncreasingNumbers": "increasing_numbers",
    "Dates": "dates",
    "Enumerable": "enumerable",
    "ReasoningGym": "reasoning",
    "ConceptToText": "concept_to_text",
    "Summarize": "summarize",
    "DataToText": "data_to_text",
    "Translate": "translate",
    "Answer": "answer",
    "Dialogue": "dialogue",
}
"""Names of the tasks, and the modules of `textgym.envs.tasks` that they are in."""
ENTRY_POINTS = {
    "textgym/Text-v0": ("textgym.envs.text:TextEnv", "textgym.envs.vector:TextVectorEnv"),
    **{
        f"textgym/{name}-v0": tuple(f"textgym.envs.tasks.{module}:{name}{kind}" for kind in ("Env", "VectorEnv"))
        for name, module in TASKS.items()
    },
    "textgym/SentimentMLP-v0": (
        "textgym.wrappers.sentiment_mlp:sentiment_mlp",
        "textgym.wrappers.sentiment_mlp:sentiment_mlp_vector",
    ),
}
ARGUMENTS = {"textgym/SentimentMLP-v0": {"kl_mode": "reference"}}  # agents see no tokens and cannot pay the KL
"""What an id is registered with; `textgym.sb3.make_vec_env` would else leave the KL to the agent."""


def register_environments() -> None:
    """Makes the ids known to `gymnasium.make` and `gymnasium.make_vec`; a second call changes nothing."""
    for env_id, (entry_point, vector_entry_point) in ENTRY_POINTS.items():
        if env_id not in gym.registry:
            kwargs = ARGUMENTS.get(env_id, {})
            gym.register(env_id, entry_point=entry_point, vector_entry_point=vector_entry_point, kwargs=kwargs)
