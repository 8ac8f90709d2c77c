"""CUDA graphs of decoding steps: capture them, find out whether they can be captured, and what they depend on.

A CUDA graph is a recorded list of kernels with the addresses of their arguments. A replay runs them without the model's
Python code. So this code must not wait for the device, and everything that it read must stay the same between capture
and replay (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
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
"""Tags of operators whose results, or the results' shapes, the host reads."""
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
COPYING = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has; they say nothing about its settings."""


class NotCapturedError(RuntimeError):
    """A step cannot be captured."""


class Graphs:
    """Captures the steps of one model.

    All graphs share one memory pool for their temporary tensors. This is safe, because the graphs run one after
    another, and all tensors that are used after a step were allocated outside of it.

    Attributes:
        reason: Why steps of this model cannot be captured; empty as long as they can.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pool: Any = None

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """Capture a step without running it, and return a function that runs it on the same tensors.

        Raises:
            NotCapturedError: If an operation of the step cannot be part of a graph.
        """
        if not self.alive:  # CUDA frees a pool together with its last graph
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                captured() as operations,
                torch.cuda.stream(torch.cuda.current_stream()),  # restores the stream; a failed capture does not
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),  # only this thread
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
    """Tell torch's allocator that a failed capture has ended.

    torch itself does not, and then `empty_cache` and later captures fail, for example after an out-of-memory error.
    """
    with contextlib.suppress(RuntimeError):  # the capture had already ended, or it never began
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class HostAccess(TorchDispatchMode):
    """Finds operations that make the host wait for the device or copy to it: these cannot be captured.

    A capture that fails at such an operation leaves torch's allocator in an invalid state. So each step first runs once
    without a capture, in this context.

    Attributes:
        operation: The first such operation, or an empty string.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and check it."""
        result = func(*args, **(kwargs or {}))
        if not self.operation and _waits(func, args, result):
            self.operation = str(func)
        return result


def _waits(func: Any, args: Any, result: Any) -> bool:
    """Return whether an operation makes the host wait: boolean indexing, copies between devices, values on the host."""
    kind = func.overloadpacket
    if kind in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if kind in COPYING:
        return len({x.device for x in (*args, result) if isinstance(x, Tensor)}) > 1
    return not VALUE_ON_HOST.isdisjoint(func.tags)


def state_of(policy: Any) -> tuple[Any, ...]:
    """Return everything that a captured step of a policy depends on, except for the values of its weights.

    These are the addresses of the weights; all plain attributes of its modules, such as the temperature, the training
    mode, the active adapters, their scales and whether they are merged; hooks; and torch's numerical settings.
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
    """Return torch's numerical settings for a device: autocast, determinism and precision of float32 products."""
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return device, autocast, torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision


def _values_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the plain values among a module's attributes, and its hooks."""
    values = [_plain(value) for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES]
    return type(module), *values, *module._forward_hooks, *module._forward_pre_hooks


def _plain(value: Any) -> Any:
    """Return a plain value, or a tuple of plain values, that can be compared later; `None` for any other object."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(x) for x in value)
    if isinstance(value, dict):
        return tuple((key, _plain(x)) for key, x in value.items())
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
