"""Learning of stock SB3 and sb3-contrib algorithms: held-out score on text, and a task whose best text is known.

    python benchmarks/learning/sb3_learning.py      # everything, three seeds
    python benchmarks/learning/sb3_learning.py --algorithms PPO --seeds 0

`textgym/Sentiment-v0` with its embedded reward model. Training prompts are prompts that no model was trained on, and
256 other prompts are used for the evaluation only. `gain` is in standard deviations of the reference's scores, and KL
in nats per text. Algorithms that learn values decode greedily, so their KL is -log pi_ref of the generated text; the
row `greedy reference` is their starting point. Then DQN and QRDQN on `textgym/Enumerable-v0`, where the best text has
score 1.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from sb3_contrib import QRDQN, TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO

from textgym import sb3
from textgym.agents.runs.evaluation import generate, measure
from textgym.data.prompts import snippet_prompts
from textgym.envs.tasks.enumerable import VOCAB_SIZE
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.functions import lexicon_sentiment
from textgym.testing import letter_tokenizer, mock_lm


@dataclass(frozen=True)
class Setting:
    """Hyperparameters of an algorithm on text."""

    algorithm: type[Any]
    total_timesteps: int
    n_envs: int
    arguments: dict[str, Any]
    kl_coef: float = 0.05
    policy: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "PPO": Setting(
        PPO, 73_728, 32, {"n_steps": 24, "batch_size": 768, "n_epochs": 2, "learning_rate": 1e-4}, kl_coef=0.07
    ),
    "A2C": Setting(
        A2C,
        81_408,
        32,
        {"n_steps": 24, "learning_rate": 1e-4, "gae_lambda": 0.95, "normalize_advantage": True},
        kl_coef=0.08,
    ),
    "TRPO": Setting(
        TRPO,
        50_688,
        64,
        {
            "n_steps": 24,
            "batch_size": 384,
            "learning_rate": 3e-4,
            "target_kl": 0.3,
            "cg_damping": 5.0,  # the Fisher matrix of some thousand tokens is noisy
            "cg_max_steps": 3,
            "n_critic_updates": 4,
        },
    ),
    "MaskablePPO": Setting(
        MaskablePPO,
        82_944,
        32,
        {"n_steps": 24, "batch_size": 768, "n_epochs": 2, "learning_rate": 1e-4},
        kl_coef=0.085,
        env={"min_new_tokens": 24},
    ),
}
Q_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "replay_buffer_kwargs": {"n_steps": 24},
    "batch_size": 256,
    "learning_starts": 1000,
    "train_freq": 8,
    "gradient_steps": 2,
    "target_update_interval": 1000,
    "exploration_fraction": 0.5,
    "exploration_final_eps": 0.05,
}
SETTINGS |= {
    "DQN": Setting(DQN, 30_000, 16, Q_ARGUMENTS, kl_coef=0.01, env={"kl_mode": "reference"}),
    "QRDQN": Setting(QRDQN, 30_000, 16, Q_ARGUMENTS, kl_coef=0.01, env={"kl_mode": "reference"}),
}
VALUE_BASED = {"DQN": sb3.TextQPolicy, "QRDQN": sb3.TextQuantilePolicy}
ENUMERABLE: dict[str, Any] = {
    "batch_size": 256,
    "buffer_size": 100_000,
    "learning_starts": 1000,
    "train_freq": 4,
    "gradient_steps": 5,
    "target_update_interval": 300,
    "exploration_fraction": 0.3,
    "exploration_final_eps": 0.4,  # there are 20,736 texts to explore
    "max_grad_norm": 1.0,
}


@dataclass
class Config:
    algorithms: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_prompts: int = 256
    enumerable_timesteps: int = 80_000
    jobs: int = 2
    """Number of concurrent runs, each on one thread."""


def train_on_text(name: str, seed: int) -> Any:
    setting = SETTINGS[name]
    env = sb3.make_vec_env(
        "textgym/Sentiment-v0",
        n_envs=setting.n_envs,
        prompts=snippet_prompts("policy"),
        kl_coef=setting.kl_coef,
        **setting.env,
    )
    shared = {"gamma": 1.0, "seed": seed, "policy_kwargs": {"model": "tiny", **setting.policy}, **setting.arguments}
    if name in VALUE_BASED:
        model = setting.algorithm(
            VALUE_BASED[name], env, replay_buffer_class=sb3.EpisodeReplayBuffer, buffer_size=50_000, **shared
        )
    else:
        maskable = name == "MaskablePPO"
        model = setting.algorithm(
            sb3.MaskableTextActorCriticPolicy if maskable else sb3.TextActorCriticPolicy,
            env,
            rollout_buffer_class=sb3.MaskableEpisodeRolloutBuffer if maskable else sb3.EpisodeRolloutBuffer,
            rollout_buffer_kwargs={"reference": "tiny", "kl_coef": setting.kl_coef},
            **shared,
        )
    return model.learn(setting.total_timesteps, log_interval=10**6)


def test_envs(setting: Setting) -> Any:
    return gym.make_vec(
        "textgym/Sentiment-v0",
        num_envs=64,
        prompts=snippet_prompts("test"),
        array="torch",
        **{**setting.env, "kl_mode": "deferred"},
    )


def on_text(name: str, seed: int, config: Config) -> dict[str, float]:
    """Return the held-out metrics of one run."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    reference = ActorCritic.from_pretrained("tiny")
    setting, prompts = SETTINGS[name], range(config.eval_prompts)
    envs = test_envs(setting)
    before = measure(generate(reference, envs, prompts, seed), reference, lexicon_sentiment)
    started = time.perf_counter()
    model = train_on_text(name, seed)
    minutes = (time.perf_counter() - started) / 60
    if name in VALUE_BASED:
        after = greedy(model.policy, envs, config.eval_prompts)
        start = greedy(type(model.policy)(**model.policy._get_constructor_parameters()), envs, config.eval_prompts)
        return {**relative(after, before), "minutes": minutes, "start": relative(start, before)}  # type: ignore[dict-item]
    after = measure(generate(model.policy.actor_critic, envs, prompts, seed), reference, lexicon_sentiment)
    return {**relative(after, before), "minutes": minutes}


def relative(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {
        "gain": (after["score"] - before["score"]) / before["score_std"],
        "KL": after["kl"],
        "judge gain": after["judge"] - before["judge"],
        "distinct-2 ratio": after["distinct_2"] / before["distinct_2"],
        "length ratio": after["length"] / before["length"],
    }


class Greedy(ActorCritic):
    """An `ActorCritic` with the greedy actions of a Q-policy, which have probability 1."""

    generates_what_act_would = False

    def __init__(self, policy: Any) -> None:
        super().__init__(policy.online.model.lm)
        self.__dict__["policy"] = policy

    def act(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        step = super().act(observation, True)
        with torch.no_grad():
            action = self.policy._predict(observation)
        return step._replace(action=action, log_prob=torch.zeros_like(step.log_prob))


def greedy(policy: Any, envs: Any, prompts: int) -> dict[str, float]:
    samples = generate(Greedy(policy.eval()), envs, range(prompts), 0)
    return measure(samples, ActorCritic.from_pretrained("tiny"), lexicon_sentiment)


def on_enumerable(name: str, seed: int, config: Config) -> float:
    """Return the score of the greedy text of a trained value-based algorithm; the best text has score 1."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    with tempfile.TemporaryDirectory() as folder:
        mock_lm(VOCAB_SIZE, hidden_size=64, seed=seed, initializer_range=0.02).save_pretrained(folder)
        letter_tokenizer(VOCAB_SIZE).save_pretrained(folder)
        env = sb3.make_vec_env("textgym/Enumerable-v0", n_envs=16, tokenizer=folder)
        model = SETTINGS[name].algorithm(
            VALUE_BASED[name],
            env,
            learning_rate=lambda left: 2e-3 * min(1.0, left / 0.3),
            gamma=1.0,
            seed=seed,
            policy_kwargs={"model": folder},
            replay_buffer_class=sb3.EpisodeReplayBuffer,
            **ENUMERABLE,
        )
        model.learn(config.enumerable_timesteps, log_interval=10**6)
        observation, done, reward = env.reset(), np.zeros(16, dtype=bool), np.zeros(16)
        while not done[0]:  # all rows generate the same text
            observation, reward, done, _ = env.step(model.predict(observation, deterministic=True)[0])
    return float(reward[0])


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def print_row(name: str, runs: list[dict[str, Any]]) -> None:
    print(
        f"| {name} | " + " | ".join(spread([run.get(key, 0.0) for run in runs]) for key in COLUMNS) + " |", flush=True
    )


COLUMNS = ("gain", "KL", "judge gain", "distinct-2 ratio", "length ratio", "minutes")


def main(config: Config) -> None:
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        texts = {
            name: [pool.submit(on_text, name, seed, config) for seed in config.seeds] for name in config.algorithms
        }
        few = {
            name: [pool.submit(on_enumerable, name, seed, config) for seed in config.seeds]
            for name in config.algorithms
            if name in VALUE_BASED
        }
        print("| algorithm | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (len(COLUMNS) + 1) + "|")
        for name, jobs in texts.items():
            runs = [job.result() for job in jobs]
            if name == "DQN":
                print_row("greedy reference", [run["start"] for run in runs])
            print_row(name, runs)
        for name, jobs in few.items():
            scores = [f"{job.result():.4f}" for job in jobs]
            print(f"{name} on the enumerable task (the best text scores 1): {', '.join(scores)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
