"""Fixtures of all tests, and what a test waits for. Threads: one, unless `OMP_NUM_THREADS` says otherwise."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import pad

from textgym.data.corpora import sources
from textgym.models.actor_critic import ActorCritic, Evaluation
from textgym.models.decoding import generation, sampling
from textgym.models.decoding.cuda_graphs import Graphs, NotCapturedError
from textgym.models.machine.determinism import missing_variables
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # two collapse when another process runs


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("bit_for_bit") is not None and "MKL_CBWR" in missing_variables():
        pytest.skip("needs MKL_CBWR=COMPATIBLE; tests/test_bit_for_bit.py runs it in a process that has it")
    if item.get_closest_marker("data") is None:
        return
    archive = sources.cache_dir() / "downloads" / sources.VADER.filename
    if not archive.exists():
        pytest.skip(f"needs {archive}, which `textgym demo` fetches")


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Variables that a test sets, as the commands of a bit-for-bit run do, do not reach the tests after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests marked `gpu` run: on the CPU, or on the device that TEXTGYM_DEVICE names; `make gpu` sets it."""
    return torch.device(os.environ.get("TEXTGYM_DEVICE", "cpu"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of benchmarks/, or of its folders gpu/ and learning/."""
    folder = Path(__file__).parents[1] / "benchmarks"
    for each in (folder / "gpu", folder / "learning", folder):
        monkeypatch.syspath_prepend(each)
    return importlib.import_module


class CpuGenerator(torch.Generator):
    """A generator on the CPU, wherever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> CpuGenerator:
        return super().__new__(cls, "cpu")


@pytest.fixture
def the_cpus_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU samples with the CPU's random numbers, for tests that compare with a CPU what was sampled.

    From one seed a GPU draws other numbers than a CPU, and then every response is another one.
    """
    monkeypatch.setattr(torch, "Generator", CpuGenerator)
    for name in ("rand", "randint"):
        monkeypatch.setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name)))
    uniform_ = Tensor.uniform_

    def uniform_there(self: Tensor, *bounds: float, generator: Any = None) -> Tensor:
        if generator is None or not self.is_cuda:
            return uniform_(self, *bounds, generator=generator)
        return self.copy_(uniform_(torch.empty(self.shape, dtype=self.dtype), *bounds, generator=generator))

    monkeypatch.setattr(Tensor, "uniform_", uniform_there)


def _drawn_on_the_cpu(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(*arguments: Any, generator: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        if generator is None:
            return real(*arguments, device=device, **kwargs)
        return real(*arguments, generator=generator, **kwargs).to("cpu" if device is None else device)

    return draw


@pytest.fixture
def plainly() -> Callable[[TokenModel, Sequences], Evaluation]:
    """What `policy.evaluate` gives, the plain way, which every fast path is held against."""
    return _plainly


def _plainly(policy: TokenModel, sequences: Sequences) -> Evaluation:
    """Each sequence alone through the whole model, without cache, packing or padding; softmax of all of its logits."""
    rows = []
    for ids, start, end in zip(sequences.input_ids, sequences.prompt_lengths, sequences.lengths, strict=True):
        logits = policy.lm(input_ids=ids[None, :end], use_cache=False).logits[0, start - 1 : end - 1].float()  # (t, V)
        tokens = torch.arange(logits.shape[1], device=ids.device)
        early = torch.arange(end - start, device=ids.device)[:, None] < sequences.stop.min_new_tokens
        stops = torch.isin(tokens, torch.tensor(sequences.stop.ids, device=ids.device))
        drawn_from = Categorical(logits=(logits / policy.temperature).masked_fill(early & stops, -1e30))
        value = torch.zeros(len(logits), device=ids.device)
        if isinstance(policy, ActorCritic):
            trunk = policy.lm.base_model if policy.critic is None else policy.critic
            states = trunk(input_ids=ids[None, :end], use_cache=False).last_hidden_state[0, start - 1 : end - 1]
            value = policy.value_head(states.float())[:, 0]
        rows.append((drawn_from.log_prob(ids[start:end]), value, drawn_from.entropy()))
    mask = sequences.response_mask
    columns = (
        [pad(values, (0, mask.shape[1] - len(values))) for values in column] for column in zip(*rows, strict=True)
    )
    return Evaluation(*(torch.stack(column) * mask for column in columns))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Responses are written in captured steps, as on a GPU; the steps that were captured.

    What asks for a value fails, as it does there.
    """
    captures: list[Callable[[], object]] = []

    def record(graphs: Graphs, step: Callable[[], object]) -> Callable[[], object]:
        try:
            captures.append(_traced(step))
        except RuntimeError as error:
            raise NotCapturedError(str(error)) from error
        return captures[-1]

    monkeypatch.setattr(Graphs, "capture", record)
    monkeypatch.setattr(generation, "can_capture", lambda device: True)
    monkeypatch.setattr(sampling, "looks_are_free", lambda device: False)
    return captures


def _traced(step: Callable[[], object]) -> Callable[[], object]:
    """Captures as a CUDA graph does: the operations on the tensors as they are now, none executed, no value asked for.

    make_fx executes while it records, so what it wrote is put back.
    """
    before = [(tensor, tensor.clone()) for tensor in _tensors(step)]
    try:
        return make_fx(lambda: step())()
    finally:
        for tensor, value in before:
            tensor.copy_(value)


def _tensors(step: Any) -> list[Tensor]:
    """What a step can write: the buffers of the generator and of its batch."""
    captured = {
        name: cell.cell_contents for name, cell in zip(step.__code__.co_freevars, step.__closure__, strict=True)
    }
    generator, batch = captured["self"], captured["batch"]
    cache = batch.decoder.cache
    owners = (
        *vars(generator).values(),
        *vars(batch).values(),
        *vars(batch.decoder).values(),
        *cache.keys,
        *cache.values,
    )
    return [value for value in owners if isinstance(value, Tensor)]
