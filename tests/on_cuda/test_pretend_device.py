"""The pretend device refuses what CUDA refuses, and captures and replays as CUDA does."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

if "tests.pretend_cuda" not in sys.modules:
    pytest.skip("about the pretend device itself", allow_module_level=True)

from tests.pretend_cuda import CUDAGraph, machine


def on_gpu(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cuda")


def captured(step: Callable[[], object], *generators: torch.Generator) -> CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph


def test_a_tensor_says_where_it_is() -> None:
    tensor = on_gpu(2)
    assert tensor.device == torch.device("cuda", 0) != torch.device("cuda")
    assert (tensor + 1).is_cuda
    assert not tensor.cpu().is_cuda
    assert nn.Linear(2, 2).to("cuda").weight.is_cuda
    assert torch.tensor([1.0]).to(tensor).device == tensor.device


def test_sequences_are_padded_on_the_gpu() -> None:
    rows = [torch.tensor([1.0, 2.0], device="cuda", requires_grad=True), torch.tensor([3.0], device="cuda")]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=9.0)
    assert padded.is_cuda
    assert padded.tolist() == [[1, 2], [3, 9]]
    padded.sum().backward()
    assert rows[0].grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: on_gpu(2) + torch.zeros(2),
        lambda: on_gpu(2, 2) @ torch.zeros(2, 2),
        lambda: torch.cat([on_gpu(2), torch.zeros(2)]),
        lambda: nn.Embedding(3, 2)(torch.zeros(2, dtype=torch.long, device="cuda")),
        lambda: torch.zeros(2)[torch.zeros(2, dtype=torch.long, device="cuda")],
        lambda: torch.zeros(()).add_(on_gpu()),
    ],
)
def test_operations_on_both_devices_are_refused(mixed: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="at least two devices"):
        mixed()


def test_scalars_and_indices_may_be_on_the_cpu() -> None:
    assert (on_gpu(2) + torch.tensor(1.0)).tolist() == [1, 1]
    assert on_gpu(2)[torch.tensor([0])].is_cuda


def test_numpy_and_other_gpus_are_refused() -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        on_gpu(2).numpy()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(2, device="cuda:3")


def test_generators_belong_to_a_kind_of_device() -> None:
    ours, theirs = torch.Generator("cuda"), torch.Generator()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(2, device="cuda", generator=theirs)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(2).uniform_(generator=ours)
    with pytest.raises(RuntimeError, match="RNG state"):
        ours.set_state(theirs.get_state())
    with pytest.raises(RuntimeError, match="RNG state"):
        theirs.set_state(ours.get_state())
    state = ours.manual_seed(3).get_state()
    first = torch.rand(2, device="cuda", generator=ours)
    ours.set_state(state)
    assert torch.equal(first, torch.rand(2, device="cuda", generator=ours))


def test_what_the_host_waits_for_is_counted() -> None:
    tensor = on_gpu(3)
    machine.syncs.clear()
    _ = (
        (tensor + 1).sum(),
        tensor[tensor.long()],
        torch.where(tensor > 0, 1.0, 0.0),
        tensor.to("cpu", non_blocking=True),
    )
    assert not machine.syncs
    for waits in (tensor.sum().item, tensor.cpu, tensor.tolist, tensor.nonzero, lambda: tensor[tensor > 0]):
        waits()
    assert machine.syncs.total() == 5


def test_a_copy_that_nobody_waited_for_has_no_contents() -> None:
    copied = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert copied.isnan().all()
    torch.cuda.synchronize()
    assert copied.tolist() == [1, 1]


def test_a_capture_does_nothing_and_a_replay_does_it_again() -> None:
    total, step = on_gpu(1), torch.ones(1, device="cuda")
    graph = captured(lambda: total.add_(step * 2))
    assert total.item() == 0
    graph.replay()
    step.fill_(5)
    graph.replay()
    assert total.item() == 12


def test_results_of_a_capture_come_with_its_replay() -> None:
    results: list[Tensor] = []
    graph = captured(lambda: results.append(torch.ones(2, device="cuda") * 2))
    assert results[0].isnan().all()
    graph.replay()
    assert results[0].tolist() == [2, 2]


def test_pythons_values_are_frozen_in_a_graph() -> None:
    total, factor = on_gpu(1), 2.0
    graph = captured(lambda: total.add_(factor))
    factor = 3.0
    graph.replay()
    assert total.item() == 2


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1], device="cuda"),
        lambda x: x.uniform_(generator=torch.Generator("cuda")),
    ],
)
def test_a_capture_refuses_the_host_and_unknown_generators(step: Callable[[Tensor], object]) -> None:
    tensor = on_gpu(2)
    with pytest.raises(RuntimeError, match=r"capturing|not in capture mode"):
        captured(lambda: step(tensor))


def test_a_registered_generator_gives_other_numbers_at_each_replay() -> None:
    drawn, generator = on_gpu(2), torch.Generator("cuda")
    graph = captured(lambda: drawn.uniform_(generator=generator), generator)
    graph.replay()
    first = drawn.tolist()
    graph.replay()
    assert drawn.tolist() != first


def test_a_replay_notices_freed_memory() -> None:
    total, step = on_gpu(1), torch.ones(1, device="cuda")
    graph = captured(lambda: total.add_(step))
    step.data = torch.ones(1, device="cuda")
    gc.collect()
    with pytest.raises(RuntimeError, match="freed"):
        graph.replay()


def test_a_capture_on_another_gpu_is_empty(two_gpus: None) -> None:
    total = torch.zeros(1, device="cuda:1")
    with pytest.warns(match="is empty"):
        graph = captured(lambda: total.add_(1))
    graph.replay()
    assert total.item() == 1
    with pytest.raises(RuntimeError, match="at least two devices"):
        total + on_gpu(1)
    with torch.cuda.device(1):
        captured(lambda: total.add_(1)).replay()
    assert total.item() == 2
