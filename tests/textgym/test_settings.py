"""Configs: what their annotations refuse, and how the error says it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest
import torch

from textgym import cli
from textgym.agents import (
    A2CConfig,
    DPOConfig,
    DQNConfig,
    GRPOConfig,
    NLPOConfig,
    PPOConfig,
    RLOOConfig,
    SFTConfig,
)
from textgym.agents.common.advantages import gae
from textgym.envs.config import TextConfig
from textgym.errors import ConfigError, TextgymError
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.kl import AdaptiveKL, FixedKL, ThresholdKL
from textgym.rewards.models import RewardModel, RewardModelConfig
from textgym.settings import Count, NotNegative, Positive, Share, check_settings, from_plain
from textgym.testing import byte_tokenizer


@dataclass
class Config:
    learning_rate: NotNegative = 0.1
    gamma: Share = 1.0
    n_steps: Count = 1
    clip: Positive | None = None
    variant: Literal["clip", "penalty"] = "clip"
    whiten: bool = False
    name: str = "run"
    anything: Any = None

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan; the default is 0.1"),
        ({"learning_rate": "fast"}, "learning_rate must be a finite number, got 'fast'"),
        ({"learning_rate": True}, "learning_rate must be a finite number, got True"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0, got -0.1"),
        ({"gamma": 1.5}, "gamma must be from 0 to 1, got 1.5; the default is 1.0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"n_steps": 1.0}, "n_steps must be a whole number, got 1.0"),
        ({"clip": 0.0}, "clip must be above 0 or None, got 0.0"),
        ({"clip": float("inf")}, "clip must be a finite number or None, got inf"),
        ({"variant": "trust"}, "variant must be 'clip' or 'penalty', got 'trust'"),
        ({"whiten": 1}, "whiten must be True or False, got 1"),
        ({"name": 3}, "name must be a string, got 3"),
    ],
)
def test_a_value_that_the_annotation_does_not_allow(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Config(**change)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TextgymError)


def test_values_that_are_allowed() -> None:
    Config(learning_rate=0, gamma=np.float32(0.5), n_steps=np.int64(2), clip=3, anything=object())


BAD: list[Any] = [math.nan, math.inf, -math.inf, -1, 0, 1e400, 10**400, "much", True, None, [1], 2.5]
"""Values that one field or another must refuse."""


def allowed(annotation: Any, value: Any) -> bool:
    """What a field's annotation says, by hand."""
    bound = {"Count": lambda x: type(x) is int and x >= 1, "WholeNumber": lambda x: type(x) is int and x >= 0}
    if annotation in bound:
        return bound[annotation](value)
    number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    ranges = {"Positive": lambda x: x > 0, "NotNegative": lambda x: x >= 0, "Share": lambda x: 0 <= x <= 1}
    return number and ranges[annotation](value)


CONFIGS = [A2CConfig, DPOConfig, DQNConfig, GRPOConfig, NLPOConfig, PPOConfig, RLOOConfig, SFTConfig, RewardModelConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_number_of_every_config_is_checked(config_class: type) -> None:
    """NaN, infinities, -1, 0, huge numbers, wrong types: what the annotation allows, and nothing else."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    kinds = ("Count", "WholeNumber", "Positive", "NotNegative", "Share")
    numbers = {name: kind for name, kind in fields.items() if kind.removesuffix(" | None") in kinds}
    assert len(numbers) > 3
    for (name, kind), value in itertools.product(numbers.items(), BAD):
        if value is None and kind.endswith("None"):
            continue
        if not allowed(kind.removesuffix(" | None"), value):
            with pytest.raises(ConfigError, match=f"^{name} must be "):
                config_class(**{name: value})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_choice_of_every_config_is_checked(config_class: type) -> None:
    hints = get_type_hints(config_class)
    choices = {name for name, kind in hints.items() if "Literal" in str(kind)}
    for name, value in itertools.product(choices, ["unknown", 3, True]):
        if not (value is True and "bool" in str(hints[name])):
            with pytest.raises(ConfigError, match=f"^{name} must be "):
                config_class(**{name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKL(math.nan), "coef must be a finite number, got nan"),
        (lambda: FixedKL(-1), "coef must be at least 0"),
        (lambda: AdaptiveKL(math.nan), "target must be a finite number"),
        (lambda: AdaptiveKL(6, horizon=0), "horizon must be above 0"),
        (lambda: ThresholdKL(1, math.inf), "high must be a finite number"),
        (lambda: Scorer(lambda completions: [], [math.nan]), "reward_weights must be a sequence, each a finite number"),
        (lambda: RewardModel.from_pretrained("tiny", max_length=1), "max_length must be at least 2, a token and EOS"),
        (lambda: RewardModel.from_pretrained("tiny", gain=math.inf), "gain must be a finite number"),
        (lambda: RewardModel.from_pretrained("tiny", batch_size=0), "batch_size must be at least 1"),
        (lambda: gae(*[torch.zeros(1, 1)] * 2, torch.ones(1, 1).bool(), gamma=2.0, lam=1.0), "gamma must be from 0 to"),
        (lambda: gae(*[torch.zeros(1, 1)] * 2, torch.ones(1, 1).bool(), 1.0, -1), "lam must be from 0 to 1, got -1"),
    ],
)
def test_arguments_of_functions_and_controllers_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_environments_check_coefficients_and_weights() -> None:
    arguments: dict[str, Any] = {"prompts": ["one"], "tokenizer": byte_tokenizer(), "reward": lambda completions: []}
    for name, value in (
        *(("kl_coef", value) for value in (math.nan, "much", True)),
        *(("reward_weights", value) for value in ([math.nan], ["1"], 1.0)),
        ("missing_eos_penalty", math.inf),
    ):
        with pytest.raises(ConfigError, match=f"^{name} must be "):
            TextConfig(**arguments, **{name: value})


@pytest.mark.parametrize("flags", ["--total-episodes -5", "--kl-coef nan", "--num-envs 0", "--temperature inf"])
def test_options_of_the_command_are_checked(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ConfigError)) as caught:
        cli.main(["train", "--output-dir", "out", *flags.split()])
    said = str(caught.value) + capsys.readouterr().err
    assert f"{flags.split()[0][2:].replace('-', '_')} must be" in " ".join(said.split())
    assert "Traceback" not in said


def test_scalars_of_numpy_and_torch_are_plain_numbers_afterwards() -> None:
    config = Config(learning_rate=torch.tensor(0.25), gamma=np.float32(0.5), n_steps=np.array(2), whiten=np.bool_(True))
    assert [type(value) for value in (config.learning_rate, config.gamma, config.n_steps, config.whiten)] == [
        float,
        float,
        int,
        bool,
    ]
    json.dumps(dataclasses.asdict(config))


@dataclass
class File:
    size: Count
    names: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "file.json must be a mapping"),
        ({}, "file.json has no field 'size'"),
        ({"size": 1, "nmes": []}, "file.json has an unknown field 'nmes': did you mean 'names'"),
        ({"size": "1"}, "file.json: size must be a whole number"),
        ({"size": 1, "names": [1]}, "file.json: names must be a sequence, each a string"),
    ],
)
def test_a_file_is_checked_before_anything_is_made_of_it(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_plain(File, values, "file.json")
