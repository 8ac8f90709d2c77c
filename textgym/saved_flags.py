"""Command lines that name a run: its settings are put before the flags that stand beside the name, which win.

    textgym resume runs/x --total-episodes 8192
    textgym train --config runs/x/config.json --output-dir runs/y --seed 2
    textgym evaluate runs/x
    textgym chat runs/x

A run's settings are data: a function or an environment of somebody else's that they name is imported only with
`--trust-names`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml

from textgym.agents.machine.saved_files import refuse_foreign_code
from textgym.errors import RunFolderError, UntrustedNameError

CONFIG, TRUST = "config.json", "--trust-names"
ASIDE = ("config", "resume", "overwrite", "output_dir", "quiet", "profile", "trust_remote_code", "log_with")
"""Settings of one call of the command alone; the agent's own ones, in `config`, are taken apart."""

SHARED = ("env", "env_kwargs", "temperature", "device")
"""Settings of a run that `evaluate` and `chat` have too: texts are to be sampled as they were in training."""


def expand(words: list[str]) -> list[str]:
    """Return a command line without names of runs: their settings stand there as flags.

    Raises:
        RunFolderError: a folder holds no run, or its settings cannot be read.
        UntrustedNameError: the settings name somebody else's code.
    """
    trusted = TRUST in words
    words = [word for word in words if word != TRUST]
    if words[:1] == ["resume"]:
        folder = _folder_after("resume", words)
        flags = flags_of(read_settings(folder / CONFIG, trusted))
        return ["train", *flags, "--output-dir", str(folder), "--resume", *words[2:]]
    if words[:1] in (["evaluate"], ["chat"]) and words[1:2] and not words[1].startswith("-"):
        folder = _folder_after(words[0], words)
        settings = read_settings(folder / CONFIG, trusted)
        chosen: dict[str, Any] = {name: settings[name] for name in SHARED if name in settings}
        chosen |= {"policy": str(folder / "policy"), "reference": settings.get("model")}
        return [words[0], *flags_of(chosen), *words[2:]]
    if words[:1] == ["train"] and "--config" in words[:-1]:
        place = words.index("--config")
        flags = flags_of(read_settings(Path(words[place + 1]), trusted))
        return ["train", *flags, *words[1:place], *words[place + 2 :]]
    return words


def read_settings(file: Path, trusted: bool) -> dict[str, Any]:
    """Read the settings of a run, JSON or YAML: those of the command, and those of the agent among them.

    Args:
        file: `config.json` of a run, or a file that its user wrote.
        trusted: whether functions and environments that it names may be imported.
    """
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"there is no {file}: give the folder of a run, which `textgym train` writes") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RunFolderError(f"{file} must hold settings by name, as the {CONFIG} of a run does")
    own = settings.get("config") or {}
    if not isinstance(own, dict):
        raise RunFolderError(f"{file}: `config` must hold the agent's settings by name, got {own!r}")
    found = {**{name: value for name, value in settings.items() if name not in ASIDE}, **own}
    if not trusted:
        _refuse_names(found, file)
    return found


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags of the command line.

    >>> flags_of({"seed": 3, "bf16": True, "kl_bounds": [2.0, 6.0], "data": None})
    ['--seed', '3', '--bf16', '--kl-bounds', '2.0', '6.0', '--data', 'None']
    """
    return [word for name, value in settings.items() for word in _flag(f"--{name.replace('_', '-')}", value)]


def _flag(flag: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield flag if value else flag.replace("--", "--no-", 1)
    elif isinstance(value, list | tuple):
        yield from (flag, *map(str, value))
    elif isinstance(value, dict):
        yield from (flag, *(str(word) for pair in value.items() for word in pair))
    else:
        yield from (flag, str(value))


def _folder_after(command: str, words: list[str]) -> Path:
    if len(words) < 2 or words[1].startswith("-"):
        raise RunFolderError(f"textgym {command} needs the folder of a run: textgym {command} runs/x")
    folder = Path(words[1])
    if not (folder / CONFIG).exists():
        raise RunFolderError(f"{folder} holds no run: it has no {CONFIG}, which `textgym train` writes")
    return folder


def _refuse_names(settings: Mapping[str, Any], file: Path) -> None:
    """Raise an error for what the settings would import, unless it is textgym's own."""
    remedy = f"if you trust it, add {TRUST}"
    env = settings.get("env")
    if isinstance(env, str) and env not in gym.registry:
        raise UntrustedNameError(f"{file} names the environment {env!r}, which textgym does not register: {remedy}")
    try:
        arguments = json.loads(settings.get("env_kwargs") or "{}")
    except ValueError as error:
        raise RunFolderError(f"{file}: env_kwargs is not JSON: {error}") from error
    for name, value in {**arguments, "data": settings.get("data")}.items():
        refuse_foreign_code(name, value, file, remedy)
