"""The software and hardware that a run's rounding depends on: saved in checkpoints and compared when a run resumes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import textgym
from textgym.models.actor_critic import ActorCritic
from textgym.models.machine.devices import device_name


def machine(policy: ActorCritic) -> dict[str, Any]:
    """Return versions, processor, threads, device and precision; if one of them differs, floats may round differently.

    `ATEN_CPU_CAPABILITY` is the vector width that torch uses, and `MKL_CBWR` the code path that MKL uses.
    """
    return {
        "textgym": textgym.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "ATEN_CPU_CAPABILITY": torch.backends.cpu.get_cpu_capability(),
        "MKL_CBWR": os.environ.get("MKL_CBWR"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "device": device_name(policy.device),
        "dtype": str(policy.lm.dtype).removeprefix("torch."),
    }


def warn_of_differences(folder: Path, saved: dict[str, Any], policy: ActorCritic) -> None:
    """Warn once, naming each difference, if a checkpoint was saved with other software or hardware than the current."""
    now = machine(policy)
    differences = [f"{name} was {saved.get(name)} and is {now[name]}" for name in now if saved.get(name) != now[name]]
    # Each kind of device has its own random generator.
    moved = not str(saved.get("device")).startswith(policy.device.type)
    if differences:
        warnings.warn(
            f"{folder} was saved under other circumstances ({'; '.join(differences)}), so the resumed run equals an "
            f"uninterrupted one only up to rounding{' and has other random numbers' if moved else ''}",
            stacklevel=3,
        )


def inputs(prompts: list[Any], scorer: Any, reference: torch.nn.Module | None) -> dict[str, str]:
    """Return hashes of the inputs of a run by name: prompts, reward functions, reference.

    Args:
        prompts: The prompts with their columns.
        scorer: The scorer, which has the reward functions.
        reference: The environment's reference, if it has one; a copy of the initial policy is saved with the agent.
    """
    rewards = {
        f"reward function {name!r}": _code(function)
        for name, function in zip(scorer.names, scorer.functions, strict=True)
    }
    models = {} if reference is None else {"reference": _weights(reference)}
    return {"prompts": _digest(json.dumps(prompts, default=str)), **rewards, **models}


def settings_of(env: Any, penalty: Any) -> dict[str, str]:
    """Return the settings of a run that its environment was made with and that change what is learned, as JSON."""
    scorer = env.scorer
    settings = {
        "max_new_tokens": env.max_new_tokens,
        "min_new_tokens": env.stop.min_new_tokens,
        "stop tokens": sorted(env.stop.ids),
        "reward_weights": scorer.weights,
        "on_reward_error": scorer.on_error,
        "score_scaling": scorer.scale.scaling,
        "score_clip": scorer.scale.clip,
        "kl_coef": penalty.coef,
        "kl_estimator": penalty.estimator,
        "kl_clamp": penalty.clamp,
    }
    return {f"{SETTING}{name}": json.dumps(value) for name, value in settings.items()}


SETTING = "setting "
"""Prefix of inputs whose values are shown if they change; those of the others are hashes."""


def warn_of_changes(folder: Path, saved: dict[str, str], now: dict[str, str]) -> None:
    """Warn once, naming them, if a run is resumed with other prompts, reward functions or models."""
    changed = [
        f"{name} was {saved.get(name)} and is {now.get(name)}" if name.startswith(SETTING) else name
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if changed:
        warnings.warn(
            f"{folder} was saved with other inputs than the current ones, so the run continues with different ones; "
            f"changed: {', '.join(changed)}",
            stacklevel=3,
        )


def _code(function: Any) -> str:
    """Hash the source of a function or of an object's class, and what it was made with: settings, closure, weights."""
    if isinstance(function, functools.partial):
        return _digest(_code(function.func) + _settings([function.args, function.keywords]))
    is_object = not inspect.isroutine(function)
    source = _source(type(function) if is_object else function)
    model = getattr(function, "model", None)
    weights = _weights(model) if isinstance(model, torch.nn.Module) else ""
    own = vars(function) if is_object and hasattr(function, "__dict__") else {}
    wrapped = _code(function.__wrapped__) if hasattr(function, "__wrapped__") else ""
    return _digest(source + weights + _settings([own, _made_with(function)]) + wrapped)


def _made_with(function: Any) -> list[Any]:
    """Return the variables of a function's closure, and the defaults of its arguments."""
    if not inspect.isfunction(function):
        return []
    closure = inspect.getclosurevars(function).nonlocals
    return [closure, function.__defaults__, function.__kwdefaults__]


def _settings(values: Any) -> str:
    """Return plain values as JSON; of other objects only the class is known, and of functions the source."""

    def described(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        if inspect.isfunction(value):
            return _source(value)
        return type(value).__qualname__

    try:
        return json.dumps(values, default=described, skipkeys=True)
    except (ValueError, RecursionError):  # values that contain themselves
        return ""


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # defined in an interactive session, or compiled
        return str(function.__qualname__)


@torch.no_grad()
def _weights(model: torch.nn.Module) -> str:
    """Hash the sums of all weights, which is fast and differs between models."""
    sums = [weight.float().sum() for weight in model.parameters() if not weight.is_meta]
    return _digest(json.dumps([f"{value:.4e}" for value in torch.stack(sums).tolist()])) if sums else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the processor's name; on Linux from /proc/cpuinfo, because `platform` does not know it there."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
