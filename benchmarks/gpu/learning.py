"""A short PPO run: gain and KL at the end; and the same run, stopped half-way, saved and resumed."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import gymnasium as gym
import torch
from figures import start, tell

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
    figures: dict[str, list[dict[str, float]]] = {"whole": [], "stopped": []}

    def noting(name: str, until: int) -> Any:
        def note_update(agent: Any, metrics: dict[str, float]) -> bool:
            figures[name].append(metrics)
            return agent.updates < until

        return note_update

    def make_agent() -> PPO:
        policy = ActorCritic.from_pretrained("tiny", device=device)
        return PPO(policy, make_envs(device, rows, new_tokens), config)

    make_agent().learn(total, [noting("whole", updates)])
    stopped = make_agent().learn(total, [noting("stopped", updates // 2)])
    with tempfile.TemporaryDirectory() as folder:
        stopped.save(folder)
        resumed = PPO.load(folder, envs=make_envs(device, rows, new_tokens), device=device)
    resumed.learn(total, [noting("stopped", updates)])

    scores = {name: [row["objective/scores"] for row in history] for name, history in figures.items()}
    size = f"{updates} updates of {rows} episodes of at most {new_tokens} tokens"
    tell("gain of the score", first_and_last(scores["whole"]), at_least=GAIN, note=size)
    tell("score at first", scores["whole"][0])
    tell("KL at the end", figures["whole"][-1]["objective/kl"], "nats a text")
    tell("gain of the run that was stopped, saved and resumed", first_and_last(scores["stopped"]), at_least=GAIN)
    half = updates // 2
    apart = max(abs(a - b) for a, b in zip(scores["whole"][: half + 1], scores["stopped"][: half + 1], strict=True))
    tell("scores apart up to the first update after the resume", apart, note="0 where kernels repeat themselves")
    tell(
        "seconds an update", statistics.median(row["time/rollout_s"] + row["time/update_s"] for row in figures["whole"])
    )
    tell("trained on", str(resumed.policy.device))


if __name__ == "__main__":
    main()
