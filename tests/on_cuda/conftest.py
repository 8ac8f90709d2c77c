"""Scenarios on a GPU: on a real one, or on the pretend one that was loaded first.

    python -m pytest -p tests.pretend_cuda tests/on_cuda

Without either they are left out. `tests/test_pretend_cuda.py` runs them on the pretend device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import textgym  # noqa: F401  (registers the environments)
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

PRETEND = sys.modules.get("tests.pretend_cuda")
collect_ignore_glob = [] if torch.cuda.is_available() else ["*"]


def pytest_configure(config: pytest.Config) -> None:
    asked_for = any(
        Path(argument.split("::")[0]).resolve().is_relative_to(Path(__file__).parent) for argument in config.args
    )
    if asked_for and not torch.cuda.is_available():
        raise pytest.UsageError("these need a GPU: python -m pytest -p tests.pretend_cuda tests/on_cuda")


@pytest.fixture(autouse=True)
def _fresh_machine() -> Iterator[None]:
    """Each test begins with one GPU; accelerate, which remembers devices, is made to look again."""
    yield
    if PRETEND is not None:
        PRETEND.machine.gpus, PRETEND.machine.current, PRETEND.machine.uneven_sums = 1, 0, 0.0
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def two_gpus() -> None:
    """A second GPU."""
    if PRETEND is not None:
        PRETEND.machine.gpus = 2
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture
def gpus() -> Callable[[int], None]:
    """Sets the number of GPUs, as on another machine; a real machine keeps those that it has."""

    def become(number: int) -> None:
        if PRETEND is None:
            return
        PRETEND.machine.gpus = number
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    return become


@pytest.fixture
def syncs() -> Callable[[], AbstractContextManager[Counter[str]]]:
    """Counts how often the host waits for the device in a block, by line."""
    if PRETEND is None:
        pytest.skip("only the pretend device counts synchronisations")

    @contextmanager
    def counting() -> Iterator[Counter[str]]:
        assert PRETEND is not None
        before, seen = Counter(PRETEND.machine.syncs), Counter[str]()
        yield seen
        seen.update(PRETEND.machine.syncs - before)

    return counting


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., ActorCritic]:
    """The embedded model as a policy on a device."""
    return lambda device="cuda", **kwargs: ActorCritic.from_pretrained("tiny", device=device, **kwargs)


@pytest.fixture(scope="session")
def make_envs() -> Callable[..., Any]:
    """A task of ours on a device, as agents take it."""

    def make(device: str | None = "cuda", num_envs: int = 4, **kwargs: Any) -> Any:
        settings = {"kl_mode": "deferred", "max_new_tokens": 6, "array": "torch", **kwargs}
        return gym.make_vec("textgym/Sentiment-v0", num_envs=num_envs, device=device, **settings)

    return make


@pytest.fixture(scope="session")
def text_envs() -> Callable[..., Any]:
    """A small environment on a device, whose responses are bytes; the longer, the better."""

    def make(device: str | None = "cuda", num_envs: int = 4, **kwargs: Any) -> Any:
        settings = {
            "prompts": ["ab", "c", "def"],
            "tokenizer": byte_tokenizer(),
            "reward": _lengths,
            "max_new_tokens": 6,
            "kl_mode": "deferred",
            "array": "torch",
            **kwargs,
        }
        return gym.make_vec("textgym/Text-v0", num_envs=num_envs, device=device, **settings)

    return make


def _lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="session")
def tiny_policy() -> Callable[..., ActorCritic]:
    """A policy of one layer over bytes, always with the same weights."""
    return lambda device="cuda", **kwargs: ActorCritic.from_pretrained(mock_lm(num_layers=1), device=device, **kwargs)


@pytest.fixture(scope="session")
def same() -> Callable[..., None]:
    """Compares values from a GPU with those from a CPU: tensors, arrays, numbers, and lists and mappings of them."""
    return _compare


def _compare(given: Any, expected: Any, tolerance: float = 1e-4) -> None:
    if isinstance(expected, dict):
        assert set(given) == set(expected)
        for name in expected:
            _compare(given[name], expected[name], tolerance)
    elif isinstance(expected, list | tuple):
        assert len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            _compare(one, other, tolerance)
    elif expected is None:
        assert given is None
    else:
        given, expected = (torch.as_tensor(value).detach().cpu() for value in (given, expected))
        torch.testing.assert_close(
            given.double(), expected.double(), atol=tolerance, rtol=tolerance, equal_nan=True, check_dtype=False
        )
