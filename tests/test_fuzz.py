"""Wrong values in every field, argument and file: right, or an error that names it. See scripts/breaking/fuzz.py."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from textgym.settings import Share, check_settings


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    """The script as a module."""
    folder = str(Path(__file__).parents[1] / "scripts" / "breaking")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("fuzz")
    finally:
        sys.path.remove(folder)


def bad(cases: Iterator[Any]) -> list[str]:
    found = list(cases)
    assert len(found) > 100
    return [f"{case.where} = {case.value}: {case.words}" for case in found if case.verdict == "bad"]


@pytest.mark.slow
def test_every_field_is_right_or_refused_by_name(fuzz: Any) -> None:
    assert bad(fuzz.settings_cases()) == []


def test_every_config_of_the_agents_is_among_them(fuzz: Any) -> None:
    names = fuzz.user_dataclasses()
    assert {"PPOConfig", "DQNConfig", "SFTConfig", "RewardModelConfig", "TextVectorConfig", "Train"} <= names.keys()
    assert all(dataclasses.is_dataclass(kind) for kind, _ in names.values())


@pytest.mark.slow
def test_every_argument_of_an_environment_is_right_or_refused_by_name(fuzz: Any) -> None:
    assert bad(fuzz.environment_cases()) == []


@pytest.mark.slow
def test_every_file_is_whole_or_named(fuzz: Any) -> None:
    assert bad(fuzz.file_cases()) == []


def test_the_cases_find_a_field_that_nobody_checks(fuzz: Any) -> None:
    @dataclass
    class Unchecked:
        gamma: float = 1.0

    @dataclass
    class Checked:
        gamma: Share = 1.0

        def __post_init__(self) -> None:
            check_settings(self)

    verdicts = {case.value: case.verdict for case in fuzz.field_cases(Unchecked, {}, "gamma", float)}
    assert [name for name, verdict in verdicts.items() if verdict == "accepted"] == ["0", "half"]
    assert set(verdicts.values()) == {"accepted", "bad"}
    verdicts = {case.value: case.verdict for case in fuzz.field_cases(Checked, {}, "gamma", float)}
    assert [name for name, verdict in verdicts.items() if verdict == "accepted"] == ["0"]
    assert set(verdicts.values()) == {"accepted", "refused"}
