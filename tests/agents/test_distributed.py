"""Several processes on the CPU, by gloo: they learn what one would from all episodes, and do not wait in vain."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import multiprocessing

from textgym.agents import A2C, GRPO, PPO, REINFORCE, RLOO
from textgym.agents.distributed import count, join, rank
from textgym.agents.rollout import Rollout
from textgym.agents.surrogate import SurrogateAgent
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import byte_tokenizer, mock_lm

Weights = dict[str, np.ndarray]
PROCESSES, EPISODES, UPDATES = 2, 16, 3
FORK = multiprocessing.get_context("fork")  # what has been imported need not be imported again
PPO_SETTINGS = {
    "num_epochs": 2,
    "minibatch_size": None,
    "micro_batch_size": 3,
    "whiten_rewards": True,
    "entropy_coef": 0.01,
    "target_kl": 1.0,
}
AGENTS: dict[str, tuple[type[SurrogateAgent], dict[str, Any]]] = {
    "ppo": (PPO, PPO_SETTINGS),
    "ppo, penalty": (PPO, {**PPO_SETTINGS, "variant": "penalty"}),
    "grpo": (GRPO, {"group_size": 4, "num_epochs": 2}),
    "grpo, mean over episodes": (GRPO, {"group_size": 4, "kl_in": "loss", "loss_type": "grpo", "micro_batch_size": 3}),
    "rloo": (RLOO, {"group_size": 4, "normalise": "batch"}),
    "a2c": (A2C, {"whiten_advantages": True}),
    "reinforce": (REINFORCE, {}),
}


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def make_agent(name: str, num_envs: int, **changes: Any) -> SurrogateAgent:
    """An agent whose settings are the same however many processes there are."""
    kind, settings = AGENTS[name]
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=num_envs,
        prompts=["one", "three", "a longer prompt"],
        tokenizer=byte_tokenizer(),
        reward=vowels,
        stop=list(range(0, 256, 8)),  # so that lengths differ
        reference=mock_lm(),
        kl_coef=AdaptiveKL(0.01, horizon=64),
        kl_mode="deferred",
        max_prompt_tokens=8,
        max_new_tokens=6,
    )
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    config = {"episodes_per_update": EPISODES, "learning_rate": 1e-3, **settings, **changes}
    return kind(policy, envs, kind.config_class(**config))


def learn(agent: SurrogateAgent) -> tuple[Weights, list[dict[str, float]]]:
    """Trains for a few updates; weights and metrics."""
    history: list[dict[str, float]] = []
    agent.learn(EPISODES * UPDATES, [lambda _, metrics: history.append(metrics)])
    return weights_of(agent), history


def weights_of(agent: SurrogateAgent) -> Weights:
    return {name: weight.detach().numpy().copy() for name, weight in agent.policy.named_parameters()}


def learn_from_a_share_of(name: str, rollouts: list[Rollout]) -> tuple[Weights, list[dict[str, float]]]:
    """The run of one process, whose rollouts are given, with a share of their rows."""
    agent = make_agent(name, EPISODES // count())
    own = slice(rank() * EPISODES // count(), (rank() + 1) * EPISODES // count())
    given = iter(rollouts)
    agent.collect = lambda: next(given)[own]  # type: ignore[method-assign]
    return learn(agent)


def launched(work: Callable[..., Any], *arguments: Any, processes: int = PROCESSES, **environment: str) -> list[Any]:
    """What `work` gives, or raises, in each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    answers: Any = FORK.SimpleQueue()
    started = [
        FORK.Process(target=_run, args=(answers, number, shared, work, arguments)) for number in range(processes)
    ]
    for process in started:
        process.start()
    results: dict[int, Any] = {}
    while len(results) < processes:
        if answers.empty() and not any(process.is_alive() for process in started):
            break
        if answers.empty():
            time.sleep(0.01)
            continue
        number, result = answers.get()
        results[number] = result
    for process in started:
        process.join()
    return [results.get(number) for number in range(processes)]


def _run(answers: Any, number: int, shared: dict[str, str], work: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(shared, RANK=str(number), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=shared["WORLD_SIZE"])
    try:
        join()
        torch.set_num_threads(1)
        answers.put((number, work(*arguments)))
    except BaseException as error:
        traceback.print_exc()
        answers.put((number, error))


def assert_same(results: list[Any], expected: tuple[Weights, list[dict[str, float]]]) -> None:
    for weights, history in results:
        for name, weight in expected[0].items():
            np.testing.assert_allclose(weights[name], weight, atol=1e-6, rtol=0, err_msg=name)
        for metrics, whole in zip(history, expected[1], strict=True):
            assert metrics.keys() == whole.keys()
            for key in metrics:
                if not key.startswith("time/"):
                    assert metrics[key] == pytest.approx(whole[key], abs=2e-5, rel=1e-4), key


@pytest.mark.parametrize("sharded", ["false", "true"], ids=["data parallel", "fsdp2"])
@pytest.mark.parametrize("name", AGENTS)
def test_two_processes_learn_what_one_learns_from_all_episodes(name: str, sharded: str) -> None:
    whole = make_agent(name, EPISODES)
    rollouts: list[Rollout] = []
    collect = whole.collect
    whole.collect = lambda: rollouts.append(collect()) or rollouts[-1]  # type: ignore[method-assign, func-returns-value]
    before = weights_of(whole)
    expected = learn(whole)
    assert max(abs(weight - before[name]).max() for name, weight in expected[0].items()) > 1e-3
    tokens = [[int(part.mask.sum()) for part in (r[: EPISODES // 2], r[EPISODES // 2 :])] for r in rollouts]
    assert all(first != second for first, second in tokens), "means of means would do as well"
    assert_same(
        launched(learn_from_a_share_of, name, rollouts, ACCELERATE_USE_FSDP=sharded, FSDP_VERSION="2"), expected
    )
