"""Options that exclude each other, or that have no effect beside another, are refused when the config is made."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import pytest
import torch

from textgym import agents, algorithms, option_pairs
from textgym.agents.configs.demo import DemoConfig
from textgym.agents.configs.rollout import OptimizerName
from textgym.agents.machine.saved_files import read_config
from textgym.envs.config import TextConfig
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.option_pairs import PAIRS, WITHOUT_DECAY, Pair, defaults_of
from textgym.rewards.models.config import RewardModelConfig
from textgym.settings import unmet
from textgym.testing import byte_tokenizer, mock_lm

CONFIGS: list[Any] = [
    *algorithms.CONFIGS.values(),
    RewardModelConfig,
    TextConfig,
    DemoConfig,
]

OTHERS: dict[str, list[Any]] = json.loads((Path(__file__).parent / "other_values.json").read_text())
"""Other values than the default of every option of an agent, one of which shows in three updates if it is used."""
OF_OTHER_CONFIGS: dict[str, list[Any]] = {
    "center_coefficient": [0.1],
    "kl_target": [6.0],
    "max_reward_failures": [0.5],
    "on_reward_error": ["skip"],
    "use_margin": [True],
}
# Pairs of options of which the second is another number.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("adam_8bit", "optimizer"): {"adam_8bit": True, "optimizer": "Adam"},
    ("adam_epsilon", "optimizer_options"): {"optimizer_options": {"eps": 1e-8}},
    ("optimizer_options", "learning_rate"): {"optimizer_options": {"lr": 0.1}},
    ("optimizer_options", "weight_decay"): {"optimizer_options": {"weight_decay": 0.1}},
    ("weight_decay", "optimizer"): {"optimizer": "Rprop"},
    ("critic_weight_decay", "optimizer"): {"optimizer": "Rprop"},
    ("kl_in", "top_p"): {"kl_in": "loss"},
    ("epsilon_fraction", "epsilon_end"): {"epsilon_start": 0.05},
    ("exploration_temperature", "epsilon_end"): {"epsilon_start": 0.0, "epsilon_end": 0.0},
    ("kl_target", "kl_coef"): {"kl_coef": 0.0},
}

hints_of = functools.cache(get_type_hints)


def values_of(config_class: Any, name: str) -> list[Any]:
    """The values of an option that a test may try: its default, and what else there is."""
    annotation = hints_of(config_class)[name]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [defaults_of(config_class)[name], *{**OTHERS, **OF_OTHER_CONFIGS}.get(name, [])]


def configs_of(pair: Pair) -> list[Any]:
    return [kind for kind in CONFIGS if {pair.option, pair.other} <= defaults_of(kind).keys()]


def excluded_settings(config_class: Any, pair: Pair) -> Iterator[dict[str, Any]]:
    """Settings with the option of a pair, and with values of the other option that exclude it."""
    defaults = defaults_of(config_class)
    beside = BESIDE.get((pair.option, pair.other))
    others = [beside] if beside is not None else [{pair.other: v} for v in values_of(config_class, pair.other)]
    for other in others:
        for value in values_of(config_class, pair.option):
            settings = {pair.option: value, **other}
            if settings[pair.option] != defaults[pair.option] and pair.excluded(SimpleNamespace(**defaults | settings)):
                yield settings


def make_config(config_class: Any, settings: dict[str, Any]) -> Any:
    needed = {"prompts": ["a"], "tokenizer": "tiny", "reward": len} if config_class is TextConfig else {}
    return config_class(**needed, **settings)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.option}, {pair.other}")
def test_each_pair_is_refused_with_both_names_and_what_to_do(pair: Pair) -> None:
    found = {kind: settings for kind in configs_of(pair) if (settings := list(excluded_settings(kind, pair)))}
    assert found, "no config has both options, or nothing is refused"
    for config_class, refused in found.items():
        messages = []
        for settings in refused:
            with pytest.raises(ConfigError, match=r"\w+=.* cannot be used with \w+=.*: .*[a-z]") as caught:
                make_config(config_class, settings)
            messages.append(str(caught.value))
        both = rf"{pair.option}=.* cannot be used with {pair.other}=.*: {re.escape(pair.advice)}"
        assert any(re.fullmatch(both, message) for message in messages), messages


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda kind: kind.__name__)
def test_defaults_never_exclude_each_other_and_equal_values_are_not_set(config_class: Any) -> None:
    assert make_config(config_class, {}) is not None
    assert make_config(config_class, defaults_of(config_class)) is not None


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (agents.PPOConfig, {"variant": "penalty", "kl_min": 0.001, "kl_max": 0.1, "penalty_coef": 2.0}),
        (agents.PPOConfig, {"dual_clip": 3.0, "clip_range": 0.1, "clip_range_high": 0.3}),
        (agents.PPOConfig, {"kl_in": "loss", "kl_gradient": "sequence"}),
        (agents.PPOConfig, {"value_coef": 0.0}),
        (agents.PPOConfig, {"optimizer": "NAdam", "adam_epsilon": 1e-3}),
        (agents.PPOConfig, {"optimizer": "SGD", "weight_decay": 0.1}),
        (agents.PPOConfig, {"ptx_data": "x.jsonl", "ptx_coef": 0.5, "ptx_batch_size": 4, "ptx_max_length": 64}),
        (agents.A2CConfig, {"estimator": "n_step", "n_steps": 3}),
        (agents.A2CConfig, {"lam": 0.5}),
        (agents.REINFORCEConfig, {"baseline": "learned", "value_coef": 1.0, "normalise_values": False}),
        (agents.REINFORCEConfig, {"gamma": 0.9}),
        (agents.GRPOConfig, {"surrogate": "cispo", "clip_range_high": 4.0}),
        (agents.GRPOConfig, {"num_epochs": 2, "target_kl": 0.1}),
        (agents.GRPOConfig, {"minibatch_size": 16, "target_kl": 0.1}),
        (agents.DQNConfig, {"prioritised": True, "priority_exponent": 0.9}),
        (agents.DQNConfig, {"backup": "greedy", "q_scale": 0.5, "double": True, "dueling": False, "noisy": True}),
        (agents.DQNConfig, {"buffer_size": 8, "episodes_per_update": 8}),
        (agents.PathwiseConfig, {"q_scale": 0.5}),
        (agents.DPOConfig, {"label_smoothing": 0.1, "epochs": 2.0}),
        (agents.OnlineDPOConfig, {"use_probability": True}),
        (RewardModelConfig, {"use_margin": True, "label_smoothing": 0.1}),
    ],
)
def test_options_that_go_together_are_accepted(config_class: Any, settings: dict[str, Any]) -> None:
    config = config_class(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("settings", [{"buffer_size": 8}, {"episodes_per_update": 10_000}])
@pytest.mark.parametrize("config_class", [agents.DQNConfig, agents.PathwiseConfig])
def test_a_replay_buffer_has_room_for_an_update(config_class: Any, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"buffer_size must be at least episodes_per_update=\d+, got \d+: "):
        config_class(**settings)


def test_the_options_of_optimisers_are_those_of_their_classes() -> None:
    options = {
        name: signature(kind).parameters
        for name, kind in vars(torch.optim).items()
        if unmet(name, OptimizerName) is None
    }
    assert {name for name, known in options.items() if "weight_decay" not in known} == set(WITHOUT_DECAY)
    assert all("eps" in known for name, known in options.items() if "Adam" in name)


# --- saved configs, which earlier versions accepted ---


def test_a_saved_option_without_effect_is_left_out_with_a_warning() -> None:
    saved = {"dual_clip": 3.0, "variant": "penalty", "penalty_coef": 2.0, "clip_range": 0.1}
    with pytest.warns(UserWarning, match=r"agent.json: config: .* cannot be used with variant='penalty'") as warnings:
        config = read_config(agents.PPOConfig, saved, "agent.json: config")
    assert config == agents.PPOConfig(variant="penalty", penalty_coef=2.0)
    assert len(warnings) == 2
    assert all("It had no effect" in str(warning.message) for warning in warnings)


def test_a_saved_config_of_options_that_exclude_each_other_is_refused_by_name() -> None:
    saved = {"label_smoothing": 0.1, "use_probability": True}
    with pytest.raises(ConfigError, match=r"agent.json: config: label_smoothing=0.1 .* use_probability=True"):
        read_config(agents.DPOConfig, saved, "agent.json: config")
    with pytest.raises(ConfigError, match=r"agent.json: config has an unknown field 'gama'"):
        read_config(agents.PPOConfig, {"gama": 1.0, "kl_max": 0.1}, "agent.json: config")


def test_an_agent_of_an_earlier_version_with_an_option_without_effect_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=["a"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [0.0] * len(completions),
    )
    with monkeypatch.context() as earlier:
        earlier.setattr(option_pairs, "PAIRS", ())
        agent = agents.PPO(ActorCritic.from_pretrained(mock_lm()), envs, agents.PPOConfig(kl_max=0.5))
        agent.save(tmp_path / "agent")
        assert json.loads((tmp_path / "agent" / "agent.json").read_text())["config"]["kl_max"] == 0.5
    with pytest.warns(UserWarning, match=r"kl_max=0.5 cannot be used with variant='clip'"):
        loaded = agents.PPO.load(tmp_path / "agent", envs=envs)
    assert loaded.config.kl_max == agents.PPOConfig().kl_max
