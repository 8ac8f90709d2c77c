"""Steps as CUDA graphs: which steps can be captured, what a captured step depends on, and the memory that all share.

A graph is a list of kernels with the addresses they work on. It runs again without the model's Python code, so the code
may not wait for the device, and nothing that it read may have changed since.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from textgym.models.machine.flops import captured, replayed

VALUE_ON_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
COPYING = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class NotCapturedError(RuntimeError):
    """A step cannot be captured."""


class Graphs:
    """Captures the steps of one model, and knows whether that is possible.

    All graphs take their temporary memory from one pool. That is safe because they run one after another, and whatever
    outlives a step is in tensors that were made outside of it.

    Attributes:
        reason: why steps of this model cannot be captured; empty as long as they can.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pool: Any = None

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """Captures a step, which does not run it, and returns what runs it on the same tensors.

        Raises:
            NotCapturedError: what the step does cannot be part of a graph.
        """
        if not self.alive:  # a pool ends with its last graph
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                captured() as operations,
                torch.cuda.stream(torch.cuda.current_stream()),  # goes back to this stream, which a failure does not
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),  # others may work meanwhile
            ):
                step()
        except RuntimeError as error:
            _leave_pool(self.pool)
            raise NotCapturedError(_first_line(error)) from error
        self.alive.add(graph)

        def replay() -> None:
            graph.replay()
            replayed(operations)

        return replay


def _leave_pool(pool: Any) -> None:
    """Ends a capture that failed for the allocator too.

    torch leaves that out, and then neither `empty_cache` nor another attempt after the memory ran out works any more.
    """
    with contextlib.suppress(RuntimeError):  # it was ended, or it never began
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class HostAccess(TorchDispatchMode):
    """Notices operations for which the host waits for the device, or copies to it: they cannot be captured.

    A capture that such an operation breaks off leaves torch's allocator in disorder. So a step is watched while it runs
    as it is, before it is captured.

    Attributes:
        operation: the first one that was seen, or empty.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        result = func(*args, **(kwargs or {}))
        if not self.operation and _waits(func, args, result):
            self.operation = str(func)
        return result


def _waits(func: Any, args: Any, result: Any) -> bool:
    kind = func.overloadpacket
    if kind in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if kind in COPYING:
        return len({x.device for x in (*args, result) if isinstance(x, Tensor)}) > 1
    return not VALUE_ON_HOST.isdisjoint(func.tags)


def state_of(policy: Any) -> tuple[Any, ...]:
    """Everything that a captured step of a policy depends on, except for the numbers in its weights.

    Which tensors the weights are; all numbers, switches and names that its modules hold, such as the temperature, the
    training mode, the active adapters, which of them are merged, and their scales; hooks; and how torch computes.
    """
    modules = list(policy.modules())
    tensors = (*policy.parameters(), *policy.buffers())
    return (
        tuple(_values_of(module) for module in modules),
        tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors),
        policy.lm.config._attn_implementation,
        *computing(tensors[0].device),
    )


def computing(device: torch.device) -> tuple[Any, ...]:
    """How torch is told to compute on a device."""
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return device, autocast, torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision


def _values_of(module: nn.Module) -> tuple[Any, ...]:
    """The plain values among a module's attributes."""
    values = [_plain(value) for name, value in vars(module).items() if name not in OF_EVERY_MODULE]
    return type(module), *values, *module._forward_hooks, *module._forward_pre_hooks


def _plain(value: Any) -> Any:
    """A value that can be compared later: of tensors and other objects nothing, since they are not plain values."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(x) for x in value)
    if isinstance(value, dict):
        return tuple((key, _plain(x)) for key, x in value.items())
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
