"""A short PPO run, and a second one that resumes from a checkpoint made after half of the first one's updates."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import gymnasium as gym
import torch
from measuring.figures import start, tell

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import PPO, PPOConfig
from textgym.models.actor_critic import ActorCritic

GAIN = 0.5
"""Minimum gain of the score (ten times the share of vowels); the gain of a policy that does not learn is near 0."""


def vowels(completions: list[str]) -> list[float]:
    """Return ten times the share of vowels among the characters of each text."""
    return [10 * sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def make_envs(device: torch.device, rows: int, new_tokens: int) -> Any:
    return gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=rows,
        reward=vowels,
        kl_mode="deferred",
        kl_coef=0.05,
        max_new_tokens=new_tokens,
        device=str(device),
    )


def first_and_last(scores: list[float]) -> float:
    """Return the mean score of the last three updates minus that of the first one."""
    return statistics.mean(scores[-3:]) - scores[0]


def main() -> None:
    device = start(__doc__)
    on_gpu = device.type == "cuda"
    rows, new_tokens, updates = (64, 24, 24) if on_gpu else (16, 8, 12)
    total = rows * updates
    config = PPOConfig(episodes_per_update=rows, minibatch_size=rows // 2, learning_rate=3e-4 if on_gpu else 1e-3)
    half = updates // 2
    whole: list[dict[str, float]] = []
    resumed: list[dict[str, float]] = []

    with tempfile.TemporaryDirectory() as folder:

        def save_at_half(agent: Any, metrics: dict[str, float]) -> None:
            whole.append(metrics)
            if agent.updates == half:
                agent.save(folder)

        policy = ActorCritic.from_pretrained("tiny", device=device)
        PPO(policy, make_envs(device, rows, new_tokens), config).learn(total, [save_at_half])
        again = PPO.load(folder, envs=make_envs(device, rows, new_tokens), device=device)
        again.learn(total, [lambda _, metrics: resumed.append(metrics)])

    figures = {"whole": whole, "resumed": whole[:half] + resumed}
    scores = {name: [row["objective/scores"] for row in history] for name, history in figures.items()}
    size = f"{updates} updates of {rows} episodes of at most {new_tokens} tokens"
    tell("gain of the score", first_and_last(scores["whole"]), at_least=GAIN, note=size)
    tell("score at first", scores["whole"][0])
    tell("KL at the end", whole[-1]["objective/kl"], "nats a text")
    gain = first_and_last(scores["resumed"])
    tell("gain of the run resumed after half of the updates", gain, at_least=GAIN)
    apart = abs(scores["whole"][half] - scores["resumed"][half])
    tell("scores apart at the first update after the resume", apart, note="0 where kernels repeat themselves")
    tell("seconds an update", statistics.median(row["time/rollout_s"] + row["time/update_s"] for row in whole))
    tell("trained on", str(again.policy.device))


if __name__ == "__main__":
    main()
