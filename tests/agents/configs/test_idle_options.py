"""No option is accepted and then makes no difference: a search through all options of all agents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym import agents, algorithms
from textgym.agents.configs.supervised import SupervisedConfig
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.option_pairs import PAIRS, defaults_of
from textgym.testing import byte_tokenizer, mock_lm

ALGORITHMS = list(algorithms.ALGORITHMS.values())
OTHERS: dict[str, list[Any]] = json.loads((Path(__file__).parent / "other_values.json").read_text())
"""Other values than the default of every option of an agent, one of which shows in three updates if it is used."""
# What an option is set with, so that it shows.
WITH: dict[str, dict[str, Any]] = {
    "kl_min": {"kl_max": 1e9},
    "max_length": {"allow_faulty_rows": 1.0},  # a cut row is a faulty one
    "scale": {"kl_in": "loss"},  # scale="each" refuses a KL in the reward
    "max_steps": {"epochs": 1.0},  # the default: it replaces other numbers of epochs
}
# What makes no difference to the numbers that are learned, or not on this machine.
NO_DIFFERENCE = {
    *("adam_8bit", "bf16", "gradient_checkpointing", "micro_batch_size", "on_nonfinite"),
    *("add_special_tokens", "allow_faulty_rows", "append_eos"),
}
# What an agent refuses whatever else is set.
ALWAYS_REFUSED: dict[str, set[str]] = {
    "A2C": {"num_epochs", "minibatch_size", "target_kl"},  # it makes one step of a rollout
    "REINFORCE": {"num_epochs", "minibatch_size", "target_kl"},
    "NLPO": {"kl_in", "kl_gradient"},  # its mask is not in the KL of the loss
}
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


def config_of(name: str, settings: dict[str, Any]) -> Any:
    config_class = getattr(agents, f"{name}Config")
    sizes = {} if issubclass(config_class, SupervisedConfig) else {"episodes_per_update": ROWS, "learning_rate": 1e-2}
    return config_class(**{**sizes, **SIZES[name], **settings})


def make_agent(name: str, config: Any) -> Any:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    kind = getattr(agents, name)
    if isinstance(config, SupervisedConfig):
        rows = [
            {"prompt": f"{i}", "completion": f"abc{i}", "chosen": f"de{i}", "rejected": f"fghi{i}", "probability": 0.8}
            for i in range(6)
        ]
        return kind(policy, rows, byte_tokenizer(), config)
    return kind(policy, make_envs(), config)


def accepted(name: str, settings: dict[str, Any]) -> Any | None:
    """An agent with these settings, unless its optimiser has no such argument."""
    try:
        return make_agent(name, config_of(name, settings))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        return None


def learned(agent: Any) -> dict[str, torch.Tensor]:
    """Everything that three updates change: weights, those of further models, and metrics."""
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
        for value in OTHERS[other]:
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


def other_values(name: str, option: str, setting: dict[str, Any]) -> list[Any]:
    """Values of an option, other than the one in force, that a config accepts beside a setting and what shows them."""
    in_force = getattr(config_of(name, setting), option)
    return [value for value in OTHERS[option] if value != in_force and accepts(name, setting, option, value)]


def accepts(name: str, setting: dict[str, Any], option: str, value: Any) -> bool:
    try:
        config_of(name, {**setting, **WITH.get(option, {}), option: value})
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_search_tries_every_option_that_is_not_always_refused(name: str) -> None:
    """In one circumstance at least; otherwise an option that makes no difference would not be found."""
    options = set(options_of(name)) - NO_DIFFERENCE
    tried = {
        option
        for setting in circumstances(name)
        for option in options - setting.keys()
        if other_values(name, option, setting)
    }
    assert options - tried == ALWAYS_REFUSED.get(name, set())


def idle_options(name: str, setting: dict[str, Any]) -> Iterator[str]:
    """Options that are accepted beside a setting, and whose values make no difference to what is learned."""
    expected = learned(accepted(name, setting))
    for option in options_of(name):
        if option in NO_DIFFERENCE or option in setting:
            continue
        beside = {**setting, **WITH.get(option, {})}
        found = [
            agent
            for value in other_values(name, option, setting)
            if (agent := accepted(name, {**beside, option: value})) is not None
        ]
        if not found:
            continue
        without = expected if beside == setting else learned(accepted(name, beside))
        if all(same(learned(agent), without) for agent in found):
            yield option


@pytest.mark.slow
@pytest.mark.bit_for_bit
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
