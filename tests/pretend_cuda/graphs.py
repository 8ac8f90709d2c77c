"""CUDA graphs: what an operation on the GPU does while it is captured, and when it is replayed."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._mode_utils import no_dispatch

from .machine import machine
from .tensor import tensors_in

_pools = itertools.count(1)


def patch() -> None:
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph  # type: ignore[misc,assignment]
    torch.cuda.graphs.CUDAGraph, torch.cuda.graphs.graph = CUDAGraph, graph  # type: ignore[misc,assignment]
    torch.cuda.graph_pool_handle = torch.cuda.graphs.graph_pool_handle = new_pool  # type: ignore[assignment]


def new_pool() -> tuple[int, int]:
    return (0, next(_pools))


class Address:
    """A tensor as a graph knows it: where it lies. Whether there still is anything is not the graph's to say."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.layout = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        """What lies there now."""
        if self.storage.expired():
            raise RuntimeError("a CUDA graph reads memory that was freed after its capture")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Recorded(NamedTuple):
    """An operation, its arguments, and the memory that its results are written to."""

    func: Any
    args: Any
    kwargs: Any
    results: list[tuple[int, Address]]


class CUDAGraph:
    """Operations on one GPU, recorded and not carried out; `replay` carries them out at the same addresses.

    Python's values are those of the capture. Memory that was allocated in it belongs to the graph; other memory has to
    be kept by whoever captured. `captured` and `pools` tell tests how many graphs there are, and in which memory.
    """

    captured: ClassVar[int] = 0
    pools: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[Recorded] = []
        self.generators: set[Any] = set()
        self.own: dict[int, Any] = {}  # storages that the capture allocated
        self.before_capture: dict[int, tuple[Any, Any]] = {}
        self.gpu = 0

    def register_generator_state(self, generator: Any) -> None:
        self.generators.add(generator)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        machine.refuse_in_capture("another capture")
        self.gpu, self._pool = machine.current, pool or new_pool()
        CUDAGraph.captured += 1
        CUDAGraph.pools.add(self._pool)
        machine.capture = self

    def capture_end(self) -> None:
        machine.capture = None
        for storage, contents in self.before_capture.values():
            storage.copy_(contents)
        self.before_capture.clear()
        for operation in self.operations:  # nothing has been computed yet
            for _, address in operation.results:
                if address.dtype.is_floating_point:
                    address.tensor().fill_(torch.nan)
        if not self.operations:
            warnings.warn(
                "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on wrong "
                "device or stream.",
                stacklevel=3,
            )

    def before(self, written: list[Tensor]) -> None:
        """Keeps what an operation is about to write over, since a capture changes nothing."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and storage._cdata not in self.before_capture:
                self.before_capture[storage._cdata] = storage, storage.clone()

    def record(
        self, func: Any, args: Any, kwargs: Any, results: list[Tensor], given: list[Tensor], written: list[Tensor]
    ) -> None:
        theirs = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [(i, x) for i, x in enumerate(results) if x.untyped_storage()._cdata not in theirs]
        if not fresh and not written:
            return  # another view of the same memory
        self.own |= {x.untyped_storage()._cdata: x.untyped_storage() for _, x in fresh}
        addresses = [(i, Address(x)) for i, x in fresh]
        self.operations.append(Recorded(func, addressed(args), addressed(kwargs), addresses))

    @torch.no_grad()
    def replay(self) -> None:
        machine.refuse_in_capture("a replay")
        with no_dispatch():
            for operation in self.operations:
                given = operation.func(*resolved(operation.args), **resolved(operation.kwargs))
                results = list(tensors_in([given]))
                for i, address in operation.results:
                    address.tensor().copy_(results[i])

    def reset(self) -> None:
        self.operations.clear()
        self.own.clear()

    def pool(self) -> tuple[int, int]:
        return self._pool


def addressed(value: Any) -> Any:
    """Tensors of the GPU as addresses; those of the CPU by value, as they go into a graph."""
    if isinstance(value, Tensor):
        return Address(value) if value.is_cuda else value.clone()
    if isinstance(value, list | tuple):
        return type(value)(addressed(x) for x in value)
    return {name: addressed(x) for name, x in value.items()} if isinstance(value, dict) else value


def resolved(value: Any) -> Any:
    """The opposite of `addressed`, with what lies at the addresses now."""
    if isinstance(value, Address):
        return value.tensor()
    if isinstance(value, list | tuple):
        return type(value)(resolved(x) for x in value)
    return {name: resolved(x) for name, x in value.items()} if isinstance(value, dict) else value


class graph:
    """`torch.cuda.graph`: captures on the current GPU what runs inside."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        self.cuda_graph, self.pool = cuda_graph, pool

    def __enter__(self) -> None:
        machine.wait("the begin of a capture")
        self.cuda_graph.capture_begin(self.pool)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        with warnings.catch_warnings(action="ignore") if error is not None else contextlib.nullcontext():
            self.cuda_graph.capture_end()
        if error is not None:
            self.cuda_graph.reset()
