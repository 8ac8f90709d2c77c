"""One update on a device moves the weights as the CPU's does: every agent, SFT, DPO, reward models, SB3's PPO.

Devices sample different tokens from one seed, so the agents learn from one rollout, which the CPU made.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor, nn

from textgym import agents
from textgym.agents.common.rollout import Rollout
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.models import RewardModel, RewardModelConfig, train_reward_model
from textgym.testing import assert_close, assert_trained_alike, byte_tokenizer, mock_lm, terms_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")]

CPU = torch.device("cpu")
LEARNING_RATE = 1e-3
GROUPS = {"group_size": 4}
AGENTS: dict[str, dict[str, Any]] = {
    "A2C": {},
    "DQN": {"batch_size": 8, "gradient_steps": 1, "learning_starts": 1},
    "ExpertIteration": GROUPS,
    "GRPO": {**GROUPS, "kl_in": "loss"},
    "NLPO": {"minibatch_size": 8},
    "OnlineDPO": GROUPS,
    "PPO": {"minibatch_size": 8},
    "Pathwise": {"batch_size": 8, "gradient_steps": 1, "learning_starts": 1},
    "REINFORCE": {},
    "RLOO": GROUPS,
}
TEXTS = ["one", "two is more", "three", "a longer text"]


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def make_envs(device: torch.device, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": ["one", "three", "a longer prompt"],
        "tokenizer": byte_tokenizer(),
        "reward": vowels,
        "stop": list(range(0, 256, 8)),  # so that lengths differ
        "kl_coef": 0.02,
        "kl_mode": "deferred",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
        "device": str(device),
    }
    return gym.make_vec("textgym/Text-v0", num_envs=16, **{**settings, **changes})


def make_policy(device: torch.device) -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm(), device=device)


def make_agent(name: str, device: torch.device) -> Any:
    kind = getattr(agents, name)
    config = kind.config_class(episodes_per_update=16, learning_rate=LEARNING_RATE, **AGENTS[name])
    agent = kind(make_policy(device), make_envs(device), config)
    agent.total_episodes = 16
    return agent


def moved(value: Any, device: torch.device) -> Any:
    """A rollout on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: moved(part, device) for name, part in fields.items()})
    return value


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in module.state_dict().items()}


def assert_moved(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    farthest = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert farthest > LEARNING_RATE / 2, "the update moved nothing"


def assert_moved_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """The steps of all weights agree to 2% of the learning rate.

    Adam divides a gradient by its size plus an epsilon, which is large enough for steps from rounding to be small.
    """
    assert actual.keys() == expected.keys()
    assert_moved(expected, before)
    for name in expected:
        apart = float((actual[name] - expected[name]).abs().max())
        assert apart < 0.02 * LEARNING_RATE, f"{name}: {apart / LEARNING_RATE:.3f} learning rates apart"


@pytest.mark.usefixtures("the_cpus_numbers")  # Pathwise samples in its update
@pytest.mark.parametrize("name", AGENTS)
def test_one_update_moves_the_weights_as_the_cpus(device: torch.device, name: str) -> None:
    one, other = make_agent(name, CPU), make_agent(name, device)
    before = weights_of(one.policy)
    rollout: Rollout = one.play()

    metrics = []
    for agent in (one, other):
        own = moved(rollout, agent.policy.device)
        metrics.append(agent.update(own, agent.measure_kl(own)))
    assert_moved_alike(weights_of(other.policy), weights_of(one.policy), before)
    assert metrics[0].keys() == metrics[1].keys()
    for figure in metrics[0]:
        assert metrics[1][figure] == pytest.approx(metrics[0][figure], rel=1e-2, abs=1e-3), figure


@pytest.mark.parametrize("name", AGENTS)
def test_a_whole_update_with_its_rollout_runs_there(device: torch.device, name: str) -> None:
    agent = make_agent(name, device)
    figures: list[dict[str, float]] = []
    agent.learn(32, [lambda _, metrics: figures.append(metrics)])
    assert agent.updates == len(figures) == 2
    assert all(value == value for row in figures for value in row.values()), "a figure is NaN"
    assert figures[0]["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert {str(weight.device) for weight in agent.policy.parameters()} == {str(agent.policy.device)}
    assert agent.policy.device.type == device.type


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_agents_on_data_move_the_weights_as_the_cpus(device: torch.device, name: str) -> None:
    rows = {
        "SFT": [{"prompt": "it is ", "completion": text} for text in TEXTS],
        "DPO": [{"prompt": "it is ", "chosen": text, "rejected": text[::-1]} for text in TEXTS],
    }[name]
    kind, weights = getattr(agents, name), []
    for place in (CPU, device):
        policy = make_policy(place)
        before = weights_of(policy.lm)
        config = kind.config_class(batch_size=4, learning_rate=LEARNING_RATE, epochs=1)
        trained = kind(policy, rows, byte_tokenizer(), config).learn()
        assert trained.updates == 1
        assert policy.device.type == place.type
        weights.append(weights_of(policy.lm))
    assert_moved(weights[0], before)
    assert_trained_alike(weights[1], weights[0], LEARNING_RATE)  # the epsilon of SFT and DPO is 1e-8


def test_a_reward_model_learns_and_scores_as_on_the_cpu(device: torch.device, tmp_path: Any) -> None:
    mock_lm().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pairs = [
        {"prompt": "it is ", "chosen": text, "rejected": text[::-1], "group": index} for index, text in enumerate(TEXTS)
    ]
    config = RewardModelConfig(learning_rate=1e-3, matrix_learning_rate=0.0)
    trained, _ = train_reward_model(pairs, str(tmp_path), config=config, heldout=pairs, device=device)
    assert trained.device.type == device.type
    prompts, scores = ["it is "] * len(TEXTS), []
    for place in (CPU, device):
        model = RewardModel(copy.deepcopy(trained.model).to(place), byte_tokenizer())
        scores.append(model(prompts=prompts, completions=TEXTS))
    assert_close(scores[1], scores[0], terms=terms_of(trained.model))


def test_stock_ppo_of_sb3_learns_there_and_scores_as_the_cpu_does(device: torch.device, tmp_path: Any) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from textgym.sb3 import EpisodeRolloutBuffer, TextActorCriticPolicy, make_vec_env

    mock_lm().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = {"prompts": ["one", "three"], "tokenizer": str(tmp_path), "reward": vowels, "max_new_tokens": 6}
    envs = make_vec_env("textgym/Text-v0", n_envs=4, kl_coef=0.0, max_prompt_tokens=8, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SB3 says that it is meant for the CPU
        model = sb3.PPO(
            TextActorCriticPolicy,
            envs,
            n_steps=12,
            batch_size=16,
            n_epochs=1,
            gamma=1.0,
            seed=0,
            device=str(device),
            policy_kwargs={"model": str(tmp_path)},
            rollout_buffer_class=EpisodeRolloutBuffer,
        )
        model.learn(48)
    assert model.policy.device.type == device.type
    obs = {name: torch.as_tensor(column).to(model.policy.device) for name, column in envs.reset().items()}
    actions = torch.full((4,), 100, device=model.policy.device)
    on_cpu = copy.deepcopy(model.policy).to("cpu")
    with torch.no_grad():
        mine = model.policy.evaluate_actions(obs, actions)
        expected = on_cpu.evaluate_actions({name: column.cpu() for name, column in obs.items()}, actions.cpu())
    for name, one, other in zip(("values", "log-probs", "entropies"), mine, expected, strict=True):
        assert_close(one, other, terms=1000, what=name)
