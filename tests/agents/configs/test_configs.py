"""Hyperparameters: what all of them have in common, whatever the algorithm."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import pytest

from textgym.agents import configs

MODULES = [
    importlib.import_module(f"{configs.__name__}.{module.name}") for module in pkgutil.iter_modules(configs.__path__)
]
CONFIGS = [
    kind
    for module in MODULES
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_hyperparameters_are_given_by_name(kind: Any) -> None:
    """By place, a new one of a base class would move those of all others."""
    with pytest.raises(TypeError, match="positional argument"):
        kind(1)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_run_without_a_seed_has_seed_0_and_plain_float32(kind: Any) -> None:
    """So all agents repeat a run of which nothing was set, and nothing is rounded or recomputed unasked."""
    config = kind()
    assert getattr(config, "seed", 0) == 0
    unasked = ("bf16", "adam_8bit", "gradient_checkpointing", "deterministic")
    assert not any(getattr(config, name, False) for name in unasked)
