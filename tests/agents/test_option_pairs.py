"""Options that exclude each other, or that have no effect beside another, are refused when the config is made."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import pytest
import torch

from textgym import agents, flags, option_pairs
from textgym.agents.configs.demo import DemoConfig
from textgym.agents.configs.supervised import SupervisedConfig
from textgym.agents.machine.saved_files import read_config
from textgym.envs.config import TextConfig
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.option_pairs import PAIRS, Pair
from textgym.rewards.models.config import RewardModelConfig
from textgym.testing import byte_tokenizer, mock_lm

ALGORITHMS = list(flags.ALGORITHMS.values())
CONFIGS: list[Any] = [
    *(getattr(agents, f"{name}Config") for name in ALGORITHMS),
    RewardModelConfig,
    TextConfig,
    DemoConfig,
]

# Other values than the default of every option of an agent, one of which shows in three updates if the option is used.
OTHERS: dict[str, list[Any]] = {
    "adam_epsilon": [0.1],
    "anneal_learning_rate": [False],
    "annealing": ["cosine"],
    "backup": ["greedy"],
    "baseline": ["none", "learned"],
    "batch_size": [3],
    "beta": [0.5],
    "buffer_size": [8],
    "clip_range": [1e-3],
    "clip_range_high": [1e-3],
    "clip_range_value": [1e-4],
    "constraint_learning_rate": [0.5],
    "constraints": [{"vowels": -1.0}],
    "critic_lam": [0.3],
    "critic_learning_rate": [1e-3],
    "critic_max_grad_norm": [1e-3],
    "critic_weight_decay": [0.5],
    "double": [True],
    "dual_clip": [1.001],
    "dueling": [False],
    "dynamic_sampling": [1],
    "ema_decay": [0.5],
    "entropy_coef": [0.1],
    "entropy_share": [0.5],
    "episodes_per_update": [16],
    "epochs": [3.0],
    "epsilon_end": [0.5],
    "epsilon_fraction": [0.9],
    "epsilon_start": [0.5],
    "estimator": ["td", "n_step", "q"],
    "exploration_temperature": [3.0],
    "freezing_actor_steps": [1],
    "gamma": [0.5],
    "gradient_steps": [1],
    "group_size": [2],
    "importance_cap": [0.5],
    "keep": [2],
    "kl_gradient": ["sequence", "k3"],
    "kl_in": ["loss"],
    "kl_max": [1e9],
    "kl_min": [1e8],
    "label_smoothing": [0.1],
    "lam": [0.5],
    "learning_rate": [1e-3],
    "learning_starts": [16],
    "loss": ["hinge", "ipo"],
    "loss_type": ["grpo", "dr_grpo"],
    "mask_update_interval": [1],
    "max_grad_norm": [1e-3],
    "max_length": [4],
    "max_steps": [1],
    "min_score": [0.5],
    "min_tokens_to_keep": [250],
    "minibatch_size": [8],
    "n_quantiles": [3],
    "n_steps": [2],
    "noisy": [True],
    "normalise": ["batch"],
    "normalise_values": [False],
    "num_epochs": [1],
    "optimizer": ["SGD"],
    "optimizer_options": [{"eps": 1e-3}],
    "overlong_buffer": [3],
    "overlong_penalty": [0.0, 3.0],
    "penalty_coef": [0.5],
    "prioritised": [True],
    "priority_correction": [1.0],
    "priority_exponent": [0.0, 2.0],
    "ptx_batch_size": [2],
    "ptx_coef": [0.5],
    "ptx_data": ["texts.jsonl"],
    "ptx_max_length": [4],
    "q_scale": [0.5],
    "ratio": ["sequence"],
    "relaxation": ["gumbel"],
    "relaxation_temperature": [3.0],
    "reward_to_go": [False],
    "scale": ["none", "each"],
    "seed": [1],
    "surrogate": ["cispo"],
    "target_kl": [0.0],
    "target_update_interval": [1],
    "tau": [0.5],
    "top_p": [0.5, 1.0],
    "use_probability": [True],
    "value_coef": [0.0, 3.0],
    "variant": ["penalty"],
    "warmup": [0.5],
    "weight_decay": [0.5],
    "whiten_advantages": [True, False],
    "whiten_rewards": [True],
}
# What an option is set with, so that it shows.
WITH: dict[str, dict[str, Any]] = {"kl_min": {"kl_max": 1e9}}
OF_OTHER_CONFIGS: dict[str, list[Any]] = {
    "center_coefficient": [0.1],
    "kl_target": [6.0],
    "max_reward_failures": [0.5],
    "on_reward_error": ["skip"],
    "use_margin": [True],
}
# What makes no difference to the numbers that are learned, or not on this machine.
NO_DIFFERENCE = {
    *("adam_8bit", "bf16", "gradient_checkpointing", "micro_batch_size", "on_nonfinite"),
    *("add_special_tokens", "allow_faulty_rows", "append_eos"),
}
# Pairs of options of which the second is another number.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("adam_8bit", "optimizer"): {"adam_8bit": True, "optimizer": "Adam"},
    ("adam_epsilon", "optimizer_options"): {"optimizer_options": {"eps": 1e-8}},
    ("optimizer_options", "learning_rate"): {"optimizer_options": {"lr": 0.1}},
    ("optimizer_options", "weight_decay"): {"optimizer_options": {"weight_decay": 0.1}},
    ("weight_decay", "optimizer"): {"optimizer": "Rprop"},
    ("critic_weight_decay", "optimizer"): {"optimizer": "Rprop"},
    ("buffer_size", "episodes_per_update"): {"buffer_size": 8},
    ("episodes_per_update", "buffer_size"): {"episodes_per_update": 10_000},
    ("kl_in", "top_p"): {"kl_in": "loss"},
    ("epsilon_fraction", "epsilon_end"): {"epsilon_start": 0.05},
    ("exploration_temperature", "epsilon_end"): {"epsilon_start": 0.0, "epsilon_end": 0.0},
    ("kl_target", "kl_coef"): {"kl_coef": 0.0},
}


def defaults_of(config_class: Any) -> dict[str, Any]:
    return option_pairs._defaults(config_class)


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
    with monkeypatch.context() as earlier:
        earlier.setattr(option_pairs, "PAIRS", ())
        make_agent("PPO", {"kl_max": 0.5}).save(tmp_path / "agent")
        assert json.loads((tmp_path / "agent" / "agent.json").read_text())["config"]["kl_max"] == 0.5
    with pytest.warns(UserWarning, match=r"kl_max=0.5 cannot be used with variant='clip'"):
        loaded = agents.PPO.load(tmp_path / "agent", envs=make_envs())
    assert loaded.config.kl_max == agents.PPOConfig().kl_max


# --- a search for pairs ---

ROWS, UPDATES = 8, 3
SIZES: dict[str, dict[str, Any]] = {
    "PPO": {"minibatch_size": 4},
    "NLPO": {"minibatch_size": 4},
    "A2C": {},
    "REINFORCE": {},
    "GRPO": {"minibatch_size": 4, "num_epochs": 2, "group_size": 4},
    "RLOO": {"minibatch_size": 4, "num_epochs": 2, "group_size": 4},
    "ExpertIteration": {"minibatch_size": 1, "num_epochs": 2, "group_size": 4},
    "OnlineDPO": {"minibatch_size": 1, "num_epochs": 2, "group_size": 4},
    "DQN": {"gradient_steps": 3, "batch_size": 4, "learning_starts": 1, "target_update_interval": 2},
    "Pathwise": {"gradient_steps": 3, "batch_size": 4, "learning_starts": 1, "target_update_interval": 2},
    "SFT": {"batch_size": 2, "epochs": 2.0},
    "DPO": {"batch_size": 2, "epochs": 2.0},
}


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def long(completion_ids: Any) -> list[float]:
    return [float(len(ids) > 3) for ids in completion_ids]


def make_envs() -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=ROWS,
        prompts=["one", "three", "a longer prompt", "x"],
        tokenizer=byte_tokenizer(),
        reward=[vowels, long],
        stop=list(range(0, 256, 8)),  # so that lengths differ
        reference=mock_lm(seed=5),
        kl_coef=0.1,
        max_new_tokens=6,
    )


def make_agent(name: str, settings: dict[str, Any]) -> Any:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    kind = getattr(agents, name)
    if issubclass(kind.config_class, SupervisedConfig):
        rows = [
            {"prompt": f"{i}", "completion": f"abc{i}", "chosen": f"de{i}", "rejected": f"fghi{i}", "probability": 0.8}
            for i in range(6)
        ]
        return kind(policy, rows, byte_tokenizer(), kind.config_class(**SIZES[name] | settings))
    sizes = {"episodes_per_update": ROWS, "learning_rate": 1e-2, **SIZES[name], **settings}
    return kind(policy, make_envs(), kind.config_class(**sizes))


def learned(name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that three updates change: weights, those of further models, and metrics."""
    agent = make_agent(name, settings)
    history: list[dict[str, float]] = []
    callback = [lambda _, metrics: history.append(metrics)]
    if isinstance(agent.config, SupervisedConfig):
        agent.learn(callback)
        frozen = {}
    else:
        agent.learn(UPDATES * ROWS, callback)
        frozen = agent.frozen_models()
    models = {"policy": agent.policy, **frozen}
    weights = {f"{name}.{key}": x for name, model in models.items() for key, x in model.state_dict().items()}
    metrics = {
        f"{update}.{key}": torch.tensor(float(value))
        for update, of_update in enumerate(history)
        for key, value in of_update.items()
        if not key.startswith("time/")
    }
    return weights | metrics


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first
    )


def circumstances(name: str) -> list[dict[str, Any]]:
    """The default settings, and every value of an option on which another one depends."""
    config_class = getattr(agents, f"{name}Config")
    fields = defaults_of(config_class)
    found: list[dict[str, Any]] = [{}]
    for other in dict.fromkeys(pair.other for pair in PAIRS if {pair.option, pair.other} <= fields.keys()):
        for value in values_of(config_class, other):
            try:
                config_class(**SIZES[name] | {other: value})
            except ConfigError:
                continue
            if {other: value} not in found and value != fields[other]:
                found.append({other: value})
    return found


def options_of(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(getattr(agents, f"{name}Config"))]


def test_the_search_knows_another_value_of_every_option() -> None:
    """So that it looks at a new option, too."""
    options = {option for name in ALGORITHMS for option in options_of(name)}
    assert options == OTHERS.keys() | NO_DIFFERENCE
    assert SIZES.keys() == set(ALGORITHMS)


def idle_options(name: str, setting: dict[str, Any]) -> Iterator[str]:
    """Options that are accepted beside a setting, and whose values make no difference to what is learned."""
    config_class = getattr(agents, f"{name}Config")
    expected = learned(name, setting)
    for option in options_of(name):
        if option in NO_DIFFERENCE or option in setting:
            continue
        outcomes = []
        beside = {**setting, **WITH.get(option, {})}
        for value in OTHERS[option]:
            settings = {**beside, option: value}
            try:
                if getattr(config_class(**SIZES[name] | settings), option) == defaults_of(config_class)[option]:
                    continue
                other = expected if beside == setting else learned(name, beside)
                outcomes.append(same(learned(name, settings), other))
            except (ConfigError, TypeError, ValueError):  # refused, or no argument of this optimiser
                continue
        if outcomes and all(outcomes):
            yield option


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "setting"),
    [pytest.param(name, setting, id=f"{name} {setting}") for name in ALGORITHMS for setting in circumstances(name)],
)
def test_every_option_that_is_accepted_makes_a_difference(
    name: str, setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ["some text", "another one", "a third one that is longer"]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(idle_options(name, setting)) == []
