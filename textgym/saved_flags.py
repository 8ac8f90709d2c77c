"""Command lines that name a run or a file: its settings are put before the flags that stand beside it, which win.

    textgym resume runs/x --total-episodes 8192
    textgym train --config runs/x/config.json --output-dir runs/y --seed 2
    textgym train --config mine.yaml
    textgym evaluate runs/x
    textgym chat runs/x

A run's settings are data: a function or an environment of somebody else's that they name is imported only with
`--trust-names`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml

from textgym.agents.configs.policy_gradient import suitable_critic
from textgym.agents.machine.saved_files import refuse_foreign_code
from textgym.algorithms import CONFIGS, DEFAULT, agent_named
from textgym.data.manifests import RUN, read_run
from textgym.errors import RunFolderError, UntrustedNameError
from textgym.settings import without_idle

CONFIG, TRUST = "config.json", "--trust-names"
SHARED = ("env", "env_kwargs", "temperature", "device")
"""Settings of a run that `evaluate` and `chat` have too: texts are to be sampled as they were in training."""
COMMAND_LINE_ALONE = ("overwrite", "trust_remote_code")
"""Settings that no file may ask for: one deletes a run, the other runs code."""
OF_ONE_CALL = (*COMMAND_LINE_ALONE, "output_dir", "resume", "quiet", "profile")
"""Settings in the `config.json` of a run that are of that call alone; a file of the user's own may have them."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Reads YAML in which 1e-5 is a number, as in JSON; PyYAML asks for a point in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def expand(words: list[str]) -> list[str]:
    """Return a command line without names of runs and files: their settings stand there as flags.

    Raises:
        RunFolderError: a folder holds no run, or settings cannot be read.
        UntrustedNameError: the settings name somebody else's code.
    """
    trusted = TRUST in words
    command, *words = [word for word in words if word != TRUST] or [""]
    if command == "resume":
        folder, words = _run_among(words)
        if folder is None:
            raise RunFolderError("textgym resume needs the folder of a run: textgym resume runs/x")
        settings = _for_training(folder / CONFIG, trusted)
        if settings.get("model") == "":
            raise RunFolderError(
                f"{folder} began in Python from a model without a name, which no command can load: resume it there, "
                "PPO.load(checkpoint, envs).learn(..., folder=...)"
            )
        return ["train", *flags_of(settings), "--output-dir", str(folder), "--resume", *words]
    if command in ("evaluate", "chat"):
        folder, words = _run_among(words)
        if folder is not None:
            settings = read_settings(folder / CONFIG, trusted)
            chosen: dict[str, Any] = {name: settings[name] for name in SHARED if name in settings}
            chosen["policy"] = str(folder / "policy")
            if settings.get("model"):
                chosen["reference"] = settings["model"]
            elif not any(word.partition("=")[0] == "--reference" for word in words):
                raise RunFolderError(
                    f"{folder} does not name the model that it began from, which KL is measured to: add --reference"
                )
            words = [*flags_of(chosen), *words]
    if command == "train":
        file, words = _file_among(words)
        if file is not None:
            words = [*flags_of(_for_agent(agent_named(words), _for_training(file, trusted), file)), *words]
    return [command, *words] if command else []


def read_settings(file: Path, trusted: bool) -> dict[str, Any]:
    """Read the settings of a run, JSON or YAML: those of the command, and those of the agent among them.

    Args:
        file: `config.json` of a run, or a file that its user wrote.
        trusted: whether functions and environments that it names may be imported.
    """
    of_run = _is_run(file.parent)
    if of_run:
        read_run(file.parent)
    settings = _loaded(file)
    own = settings.pop("config", None) or {}
    if not isinstance(own, dict) or not all(isinstance(name, str) for name in own):
        raise RunFolderError(f"{file}: `config` must hold the agent's settings by name, got {own!r}")
    settings |= own
    for name in settings:
        if not name.isidentifier():  # it would become another flag than the checks below look at
            raise RunFolderError(
                f"{file}: {name!r} is no name of a setting: write it with underscores, as in env_kwargs"
            )
    for name in COMMAND_LINE_ALONE:
        if settings.get(name) and not of_run:
            flag = f"--{name.replace('_', '-')}"
            raise RunFolderError(f"{file} asks for {name}, which a file cannot: take it out, and add {flag}")
    if "env_kwargs" in settings:
        settings["env_kwargs"] = _as_json(settings["env_kwargs"], file)
    if not trusted:
        _refuse_names(settings, file)
    aside = OF_ONE_CALL if of_run else COMMAND_LINE_ALONE
    return {name: value for name, value in settings.items() if name not in aside}


def needs_trust(folder: Path) -> bool:
    """Return whether a run's settings name code that is imported only with `--trust-names`."""
    try:
        read_settings(folder / CONFIG, trusted=False)
    except UntrustedNameError:
        return True
    return False


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags of the command line.

    >>> flags_of({"seed": 3, "bf16": True, "kl_bounds": [2.0, 6.0], "data": None})
    ['--seed', '3', '--bf16', '--kl-bounds', '2.0', '6.0', '--data', 'None']

    Raises:
        RunFolderError: If a value would become a flag.
    """
    return [word for name, value in settings.items() for word in _flag(name.replace("_", "-"), value)]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    words = list(map(str, value if isinstance(value, list | tuple) else [value]))
    for word in words:
        if word.startswith("--"):
            raise RunFolderError(f"{word!r} is a flag, but a file has it as a value of --{name}: take it out there")
    return [f"--{name}", *words]


def _run_among(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the folder of a run, which stands first or is the only run among the options, and the other words."""
    first = words and not words[0].startswith("-")
    places = [0] if first else [place for place, word in enumerate(words) if _is_run(word)]
    if not places:
        return None, words
    if len(places) > 1:
        runs = " or ".join(words[place] for place in places)
        raise RunFolderError(f"it is unclear which run is meant, {runs}: put its folder before the options")
    folder = Path(words[places[0]])
    read_run(folder)
    return folder, [word for place, word in enumerate(words) if place not in places]


def _is_run(folder: str | Path) -> bool:
    try:
        return (Path(folder) / RUN).exists()
    except OSError:  # too long for the name of a file
        return False


def _file_among(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file of `--config FILE` or `--config=FILE`, and the other words."""
    file, others = None, []
    rest = iter(words)
    for word in rest:
        if word != "--config" and not word.startswith("--config="):
            others.append(word)
            continue
        value = next(rest, "") if word == "--config" else word.removeprefix("--config=")
        if not value or value.startswith("--"):
            raise RunFolderError("--config needs a file: --config runs/x/config.json")
        if file is not None:
            raise RunFolderError(f"--config is given twice, {file} and {value}: put all settings into one file")
        file = Path(value)
    return file, others


def _loaded(file: Path) -> dict[str, Any]:
    try:
        settings = _parsed(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"there is no {file}: give the folder of a run, which `textgym train` writes") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RunFolderError(f"{file} must hold settings by name, as the {CONFIG} of a run does")
    return settings


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)  # YAML reads an escaped emoji of JSON as two halves
    except ValueError:
        return yaml.load(text, Loader=_Loader)


def _as_json(arguments: Any, file: Path) -> str:
    """Return arguments of an environment as the command line takes them; YAML may hold them as they are."""
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
        found = json.loads(text)
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{file}: env_kwargs is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{file}: env_kwargs must hold arguments by name, got {arguments!r}")
    return text


def _for_training(file: Path, trusted: bool) -> dict[str, Any]:
    """Return the settings of `read_settings`; of a run without options that had no effect, as earlier versions had."""
    settings = read_settings(file, trusted)
    config = CONFIGS.get(str(settings.get("agent") or DEFAULT))
    if config is None or not _is_run(file.parent):
        return settings
    names = {field.name for field in dataclasses.fields(config)}
    own = {name: value for name, value in settings.items() if name in names}
    kept = without_idle(config, own, str(file))
    return {name: value for name, value in settings.items() if name not in own or name in kept}


def _for_agent(agent: str | None, settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings of a file for another agent than its own.

    A run's file has every hyperparameter. Those that its agent has by default were not chosen, so the other agent has
    its own ones.
    """
    own = settings.get("agent") or DEFAULT
    if agent in (None, own) or agent not in CONFIGS or own not in CONFIGS:
        return settings
    config = CONFIGS[agent]()
    hyperparameters = json.loads(json.dumps(dataclasses.asdict(CONFIGS[own]()), default=str))
    unknown = hyperparameters.keys() - {field.name for field in dataclasses.fields(config)}  # to the other agent
    if suitable_critic(config)[0] == "shared":  # it learns no values
        unknown = unknown | {"critic", "critic_learning_rate"}
    defaults = {"critic": "auto", **(hyperparameters if _is_run(file.parent) else {})}
    chosen = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
    if lost := [name for name in chosen if name in unknown]:
        warnings.warn(f"{file} is for {own}; {agent} ignores its {', '.join(lost)}", stacklevel=2)
    return {name: value for name, value in chosen.items() if name not in unknown}


def _refuse_names(settings: Mapping[str, Any], file: Path) -> None:
    """Raise an error for what the settings would import, unless it is textgym's own."""
    remedy = f"if you trust it, add {TRUST}"
    env = settings.get("env")
    if "env" in settings and not (isinstance(env, str) and env in gym.registry):
        raise UntrustedNameError(f"{file} names the environment {env!r}, which textgym does not register: {remedy}")
    for name, value in {**json.loads(settings.get("env_kwargs", "{}")), "data": settings.get("data")}.items():
        refuse_foreign_code(name, value, file, remedy)
