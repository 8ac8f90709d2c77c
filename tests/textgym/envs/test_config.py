"""TextConfig: the arguments of environments are its fields."""

from __future__ import annotations

import inspect
import pickle
import re
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym.envs.config import TextConfig, TextVectorConfig
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.errors import UnknownArgumentError


@pytest.mark.parametrize(("environment", "config"), [(TextEnv, TextConfig), (TextVectorEnv, TextVectorConfig)])
def test_signatures_are_those_of_the_configs(environment: Any, config: Any) -> None:
    assert inspect.signature(environment).parameters == inspect.signature(config).parameters


def test_defaults_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "environments.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", page, re.MULTILINE))
    defaults = {field.name: field.default for field in fields(TextVectorConfig) if field.default is not MISSING}
    shown = {name: str(value) if isinstance(value, Enum) else repr(value) for name, value in defaults.items()}
    assert documented == shown


def test_the_first_arguments_may_be_given_by_position() -> None:
    config = TextVectorConfig(2, ["Hi"], "tiny", "reward")
    assert (config.num_envs, config.prompts, config.tokenizer, config.reward) == (2, ["Hi"], "tiny", "reward")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda **kwargs: gym.make("textgym/Text-v0", **kwargs), "TextEnv"),
        (lambda **kwargs: gym.make("textgym/Sentiment-v0", **kwargs), "SentimentEnv"),
        (lambda **kwargs: gym.make_vec("textgym/Sentiment-v0", 2, **kwargs), "SentimentVectorEnv"),
    ],
)
def test_an_unknown_argument_names_the_nearest_one(make: Any, name: str) -> None:
    message = f"{name} got an unexpected keyword argument 'max_tokens': did you mean 'max_new_tokens'?"
    with pytest.raises(UnknownArgumentError, match=message.replace("?", r"\?")) as caught:
        make(max_tokens=3)
    assert isinstance(caught.value, TypeError)
    with pytest.raises(UnknownArgumentError, match=r"'colour': it takes .*prompts, tokenizer"):
        make(colour=1)


def test_specs_hold_what_was_given() -> None:
    env = gym.make("textgym/Sentiment-v0", max_new_tokens=3)
    assert env.spec is not None
    assert env.spec.kwargs == {"max_new_tokens": 3}
    assert gym.make(pickle.loads(pickle.dumps(env.spec))).observation_space == env.observation_space
