"""Every agent on a GPU learns what it learns on a CPU; so do reward models; evaluation gives the same figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from textgym import SyncReference
from textgym.agents import (
    A2C,
    DPO,
    DQN,
    GRPO,
    NLPO,
    PPO,
    REINFORCE,
    RLOO,
    SFT,
    ExpertIteration,
    OnlineDPO,
    Pathwise,
)
from textgym.agents.engines.engine import collect_from
from textgym.agents.runs.evaluation import generate, measure
from textgym.agents.search.best_of_n import best_of_n
from textgym.rewards.functions.perplexity import Perplexity
from textgym.rewards.models import RewardModelConfig, train_reward_model
from textgym.testing import byte_tokenizer

WARM = {"learning_starts": 4, "batch_size": 4, "gradient_steps": 1}
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PPO": (PPO, {"minibatch_size": 2, "num_epochs": 1}),
    "PPO in parts": (PPO, {"micro_batch_size": 2, "gradient_checkpointing": True, "num_epochs": 1, "target_kl": 0.1}),
    "PPO with a penalty": (PPO, {"variant": "penalty", "whiten_rewards": True, "num_epochs": 1}),
    "A2C": (A2C, {}),
    "REINFORCE": (REINFORCE, {"baseline": "learned"}),
    "RLOO": (RLOO, {"group_size": 2, "normalise": "batch"}),
    "GRPO": (GRPO, {"group_size": 2, "kl_in": "loss", "kl_gradient": "sequence"}),
    "NLPO": (NLPO, {"mask_update_interval": 1, "num_epochs": 1}),
    "expert iteration": (ExpertIteration, {"group_size": 2}),
    "online DPO": (OnlineDPO, {"group_size": 2}),
    "DQN": (DQN, {**WARM, "micro_batch_size": 2}),
    "DQN with everything": (
        DQN,
        {
            **WARM,
            "backup": "greedy",
            "double": True,
            "noisy": True,
            "prioritised": True,
            "n_quantiles": 4,
            "n_steps": 3,
        },
    ),
    "pathwise": (Pathwise, WARM),
}
ROWS = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "ef"}] * 4
PAIRS = [
    {"prompt": "ab", "chosen": "c", "rejected": "xy"},
    {"prompt": "d", "chosen": "ef", "rejected": "z"},
] * 4


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """Those that do not measure time."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.usefixtures("the_cpus_numbers")
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_learns_as_on_a_cpu(
    name: str, tiny_policy: Callable[..., Any], text_envs: Callable[..., Any], same: Callable[..., None]
) -> None:
    kind, settings = AGENTS[name]
    seen: dict[str, list[dict[str, float]]] = {"cuda": [], "cpu": []}
    for device, metrics in seen.items():
        envs = text_envs(device, kl_coef=0.1, min_new_tokens=1)
        agent = kind(tiny_policy(device), envs, kind.config_class(episodes_per_update=4, seed=1, **settings))
        agent.learn(8, [lambda agent, given, metrics=metrics: metrics.append(figures(given))])
        assert agent.policy.device.type == device
    same(seen["cuda"], seen["cpu"], 2e-3)


def test_a_reference_follows_the_policy(tiny_policy: Callable[..., Any], text_envs: Callable[..., Any]) -> None:
    agent = PPO(tiny_policy(), text_envs(), PPO.config_class(episodes_per_update=4, minibatch_size=4, num_epochs=1))
    agent.learn(8, [SyncReference(1, 0.5)])
    assert agent.penalty.reference.device.type == "cuda"


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_adapters_train(critic: str, tiny_policy: Callable[..., Any], text_envs: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    policy = tiny_policy(critic=critic, lora=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    agent = PPO(policy, text_envs(kl_coef=0.1), PPO.config_class(episodes_per_update=4, num_epochs=1, bf16=True))
    seen: list[dict[str, float]] = []
    agent.learn(8, [lambda agent, metrics: seen.append(metrics)])
    assert all(math.isfinite(metrics["objective/kl"]) for metrics in seen)


@pytest.mark.parametrize(
    ("kind", "data", "settings"),
    [
        (SFT, ROWS, {}),
        (SFT, ROWS, {"bf16": True}),
        (DPO, PAIRS, {"micro_batch_size": 2, "gradient_checkpointing": True}),
    ],
    ids=["SFT", "SFT in bfloat16", "DPO in parts"],
)
def test_offline_agents_learn_as_on_a_cpu(
    kind: Any, data: Any, settings: dict[str, Any], tiny_policy: Callable[..., Any], same: Callable[..., None]
) -> None:
    losses: dict[str, list[float]] = {"cuda": [], "cpu": []}
    for device, seen in losses.items():
        agent = kind(tiny_policy(device), data, byte_tokenizer(), kind.config_class(batch_size=4, **settings))
        agent.learn([lambda agent, metrics, seen=seen: seen.append(metrics["loss"])])
        assert agent.policy.device.type == device
    same(losses["cuda"], losses["cpu"], 3e-2 if settings.get("bf16") else 2e-3)


def test_a_reward_model_trains_as_on_a_cpu(same: Callable[..., None]) -> None:
    config = RewardModelConfig(num_layers=1, batch_size=2, max_length=8, allow_faulty_rows=1.0)
    ours, _ = train_reward_model(PAIRS, config=config, heldout=PAIRS[:2])
    theirs, _ = train_reward_model(PAIRS, config=config, heldout=PAIRS[:2], device="cpu")
    assert ours.device.type == "cuda"
    assert theirs.device.type == "cpu"
    same(ours(["ab"], ["c"]), theirs(["ab"], ["c"]), 1e-3)


@pytest.mark.usefixtures("the_cpus_numbers")
def test_evaluation_gives_the_figures_of_a_cpu(
    tiny_policy: Callable[..., Any], text_envs: Callable[..., Any], same: Callable[..., None]
) -> None:
    results = []
    for device in ("cuda", "cpu"):
        policy, envs = tiny_policy(device), text_envs(device)
        samples = generate(policy, envs, range(3), 0)
        results.append(measure(samples, policy.reference(), lambda prompts, completions: [0.0] * len(prompts)))
        assert len(best_of_n(policy, envs, range(3), 2, 0).completions) == 3
    same(*results)


class Fives:
    """An engine in another process, whose answers come as lists."""

    def load_weights(self, weights: Any) -> None:
        pass

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        return [[101] * settings["max_new_tokens"] for _ in prompts]


def test_an_engine_writes_responses(
    tiny_policy: Callable[..., Any], text_envs: Callable[..., Any], same: Callable[..., None]
) -> None:
    chosen = {"prompt_index": [0, 1, 2, 0]}
    rollouts = [collect_from(Fives(), text_envs(device), tiny_policy(device), chosen) for device in ("cuda", "cpu")]
    same(rollouts[0].log_probs, rollouts[1].log_probs)
    same(rollouts[0].scores, rollouts[1].scores)


def test_responses_may_be_submitted_from_the_gpu(text_envs: Callable[..., Any]) -> None:
    envs = text_envs()
    envs.reset(seed=0)
    scores, _ = envs.unwrapped.submit(torch.full((4, 6), 101, device="cuda"), torch.full((4,), 6, device="cuda"))
    assert scores.tolist() == [6.0] * 4


def test_judges_of_texts(text_envs: Callable[..., Any]) -> None:
    envs = text_envs(reward=[Perplexity("tiny", log=True)], max_new_tokens=1)
    envs.reset(seed=0)
    _, rewards, *_ = envs.step(torch.full((4,), 101, device="cuda"))
    assert rewards.device.type == "cuda"
    assert (rewards < 0).all()
