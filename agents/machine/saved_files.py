"""The JSON file of a saved agent: all fields are checked, and loading it never runs code that it names."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import gymnasium as gym

from textgym.errors import DamagedFolderError, UntrustedNameError
from textgym.settings import Count, Positive, WholeNumber, from_plain, without_idle

Config = TypeVar("Config")
OWN_MODULES = ("textgym.rewards.functions", "textgym.data.prompts")
"""Modules whose public functions a saved environment may name."""
NAME_OF_CODE = re.compile(r"[\w.\-]+:\S+")
"""Names such as "module:attribute" and "module:Environment-v0", whose module would be imported."""


@dataclass(frozen=True)
class SavedPolicy:
    """Settings for loading a policy."""

    critic: Literal["shared", "separate"]
    temperature: Positive
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    device: str
    trained: list[str]
    active_adapters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SavedEnvironment:
    """An environment that `gym.make_vec` made from plain values."""

    id: str
    num_envs: Count
    kwargs: dict[str, Any]
    held_out: WholeNumber = 0


@dataclass(frozen=True)
class SavedAgent:
    """The training state of a `RolloutAgent`, as plain values."""

    config: dict[str, Any]
    progress: tuple[WholeNumber, WholeNumber, WholeNumber]
    controller: dict[str, Any]
    scorers: list[dict[str, Any]]
    agent: dict[str, Any]
    environment: dict[str, Any]
    env: dict[str, Any] | None
    machine: dict[str, Any]
    inputs: dict[str, Any]
    policy: dict[str, Any]
    start: str = ""


@dataclass(frozen=True)
class SavedSupervisedAgent:
    """The training state of a `SupervisedAgent`, as plain values."""

    config: dict[str, Any]
    updates: WholeNumber
    data: str
    machine: dict[str, Any]
    policy: dict[str, Any]
    start: str = ""


def read_json(path: Path) -> Any:
    """Read a JSON file of a saved folder.

    Raises:
        DamagedFolderError: If it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFolderError(f"{path} cannot be read: {error}") from error


def read_config(config_class: type[Config], saved: Any, where: str) -> Config:
    """Make the config that was saved; an option that has no effect with the others is left out, with a warning.

    Earlier versions accepted such options.

    Args:
        config_class: Class of the config.
        saved: What the file has, a mapping.
        where: The place in the file, for warnings and errors.

    Raises:
        ConfigError: If a field is unknown or has a wrong value, or two options exclude each other.
    """
    values = without_idle(config_class, saved, where) if isinstance(saved, dict) else saved
    return from_plain(config_class, values, where)


def saved_environment(envs: Any) -> dict[str, Any] | None:
    """Return the arguments that make an environment again, or `None` if they have objects or there are wrappers."""
    spec = envs.spec
    if spec is None or spec.additional_wrappers:
        return None
    kwargs = {name: value for name, value in spec.kwargs.items() if name not in ("num_envs", "vectorization_mode")}
    try:
        json.dumps(kwargs)
    except TypeError:
        return None
    return {"id": spec.id, "num_envs": envs.unwrapped.num_envs, "kwargs": kwargs}


def make_environment(saved: Any, where: Path, **own: Any) -> Any:
    """Make the environment that an agent was saved with, if it names only registered ids and textgym's own functions.

    Args:
        saved: The return value of `saved_environment`.
        where: The file, for error messages.
        own: Arguments of the caller, which replace saved ones.

    Raises:
        UntrustedNameError: If the file names an environment that is not registered, or a function that is not
            textgym's.
    """
    env = from_plain(SavedEnvironment, saved, f"{where}: env")
    if env.id not in gym.registry:
        raise UntrustedNameError(
            f"{where} names the environment {env.id!r}, which is not registered: import the module that registers it, "
            "or pass the environment, load(folder, envs)"
        )
    kwargs = {**env.kwargs, **own}
    for argument, value in env.kwargs.items():
        if argument not in own:
            reward = f"load(folder, {argument}=...) for a reward"
            refuse_foreign_code(
                argument, value, where, f"pass it yourself, {reward}, or the environment, load(folder, envs)"
            )
    return gym.make_vec(env.id, num_envs=env.num_envs, **kwargs)


def refuse_foreign_code(argument: str, value: Any, where: Path, remedy: str) -> None:
    """Raise an error for an argument of an environment that names code to import, unless it is textgym's own.

    Args:
        argument: Its name.
        value: Its value, as read from a file.
        where: The file, for the error message.
        remedy: What to do, for the error message.

    Raises:
        UntrustedNameError: If it names a function that is not textgym's.
    """
    if argument == "stop" or (argument == "prompts" and not isinstance(value, str)):
        return  # texts
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            refuse_foreign_code(argument, entry, where, remedy)
    elif isinstance(value, str) and NAME_OF_CODE.fullmatch(value) and not _is_own(value):
        raise UntrustedNameError(
            f"{where} names {value!r} as {argument}, and loading a folder runs no code that it names except textgym's "
            f"own: {remedy}"
        )


def _is_own(name: str) -> bool:
    """Return whether `module:attribute` is a public function of textgym that is defined in this module."""
    module_name, _, attribute = name.partition(":")
    if module_name not in OWN_MODULES or attribute.startswith("_"):
        return False
    found = getattr(importlib.import_module(module_name), attribute, None)
    return callable(found) and getattr(found, "__module__", "").startswith(module_name)
