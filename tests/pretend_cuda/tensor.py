"""CudaTensor: a CPU tensor that is taken for one on a GPU, and the rules for operations on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

from .machine import machine, source_line

INDEXING = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
TAKE_CPU_SCALARS = {
    *("aten::where", "aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_", "aten::lerp_"),
    *("aten::clamp", "aten::_foreach_mul", "aten::_foreach_mul_", "aten::_foreach_div_"),
}
"""Operations that take a CPU tensor of no dimensions beside CUDA tensors, as all pointwise ones do."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
"""Matrix products, whose sums a GPU adds up in another order; here they are added up in float64."""
WAITING = {
    *("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive"),
}
"""Operations whose result, or the shape of it, the host waits for."""


class CudaTensor(Tensor):
    """A CPU tensor with the tag of a GPU; every operation on it passes through `operate`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    _gpu = 0
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._gpu)

    def get_device(self) -> int:
        return self._gpu

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        new = tagged(plain(self).clone(), self._gpu).requires_grad_(self.requires_grad)
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unpickled, (plain(self).contiguous(), self._gpu, self.requires_grad, hasattr(self, "_is_param"))

    def __repr__(self, **kwargs: Any) -> str:
        return f"{plain(self)!r} on {self.device}"


def tagged(tensor: Tensor, gpu: int) -> Any:
    """The same memory as a tensor on that GPU."""
    new = Tensor._make_subclass(CudaTensor, tensor)
    if gpu:
        new._gpu = gpu
    return new


def plain(tensor: Tensor) -> Tensor:
    """The same memory as a CPU tensor, without history."""
    if not isinstance(tensor, CudaTensor):
        return tensor
    with no_dispatch(), torch.no_grad():
        return Tensor._make_subclass(Tensor, torch.ops.aten.alias.default(tensor))


def unpickled(tensor: Tensor, gpu: int, requires_grad: bool, is_parameter: bool) -> Tensor:
    """What `torch.load` makes of a saved `CudaTensor`; `moving.load` decides where it goes."""
    machine.device(gpu)  # raises if there is no such GPU here
    new = tagged(tensor.clone(), gpu).requires_grad_(requires_grad)
    if is_parameter:
        new._is_param = True
    return new


class Operation(NamedTuple):
    """What the rules need to know of an operation: `writes` names the arguments that it writes."""

    name: str
    pointwise: bool
    arguments: tuple[str, ...]
    writes: frozenset[str]


@cache
def known(func: Any) -> Operation:
    arguments = func._schema.arguments
    writes = frozenset(x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write)
    pointwise = torch.Tag.pointwise in func.tags
    return Operation(func._schema.name, pointwise, tuple(x.name for x in arguments), writes)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def operate(func: Any, args: Any, kwargs: Any) -> Any:
    """Carries an operation out if CUDA would, and tags what it gives."""
    operation = known(func)
    tensors = list(tensors_in((*args, *kwargs.values())))
    index = next(tensor for tensor in tensors if isinstance(tensor, CudaTensor))._gpu
    named = {**dict(zip(operation.arguments, args, strict=False)), **kwargs}
    written = list(tensors_in(named[name] for name in operation.writes if name in named)) if operation.writes else []

    check_placement(operation, args, tensors, written)
    check_host_access(operation, func, named, tensors)

    graph = machine.capture if machine.capture is not None and machine.capture.gpu == index else None
    if graph is not None:
        graph.before(written)
    with no_dispatch():
        result = carried_out(operation, func, *args, **kwargs)

    given = {id(tensor) for tensor in tensors}

    def tag(value: Any) -> Any:
        ours = isinstance(value, Tensor) and id(value) not in given and not isinstance(value, CudaTensor)
        return tagged(value, index) if ours else value

    result = tag(result) if isinstance(result, Tensor) else tree_map(tag, result)
    if graph is not None and not func.is_view:
        kernel = partial(carried_out, operation, func)
        graph.record(kernel, args, kwargs, list(tensors_in([result])), tensors, written)
    return result


def carried_out(operation: Operation, func: Any, *args: Any, **kwargs: Any) -> Any:
    """The CPU's result, with matrix products that are rounded otherwise, and like CUDA's where those differ by more."""
    if operation.name == "aten::histc" and not args[0].is_floating_point():  # CUDA has it for integers, the CPU not
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    if operation.name in PRODUCTS and args[0].is_floating_point():
        wide_args, wide_kwargs = tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*wide_args, **wide_kwargs).to(args[0].dtype)
    result = func(*args, **kwargs)
    if machine.uneven_sums and operation.name == "aten::cumsum" and result.is_floating_point():
        result[..., 1::3] *= 1 + machine.uneven_sums
        result[..., 2::3] *= 1 - machine.uneven_sums
    return result


def check_placement(operation: Operation, args: Any, tensors: list[Tensor], written: list[Tensor]) -> None:
    """All tensors are on one GPU, but for CPU scalars in pointwise operations and CPU indices of CUDA tensors."""
    if operation.name == "aten::copy_":
        return
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    others = [tensor for tensor in tensors if not tensor.is_cuda]
    if len(devices) > 1:
        refuse_mixed(operation, tensors)
    if not others or operation.name in ("aten::lift_fresh", "aten::set_"):
        return
    if operation.name in INDEXING:
        if not args[0].is_cuda or (len(args) > 2 and not args[2].is_cuda and args[2].dim() > 0):
            refuse_mixed(operation, tensors)
        return
    takes_scalars = operation.pointwise or operation.name in TAKE_CPU_SCALARS
    if not takes_scalars or any(tensor.dim() > 0 for tensor in others) or any(not x.is_cuda for x in written):
        refuse_mixed(operation, tensors)


def refuse_mixed(operation: Operation, tensors: list[Tensor]) -> NoReturn:
    found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices "
        f"({operation.name}: {found}) at {source_line()}"
    )


def check_host_access(operation: Operation, func: Any, named: dict[str, Any], tensors: list[Tensor]) -> None:
    """Counts where the host waits for the device; raises in a capture."""
    name = operation.name
    if name == "aten::copy_" and not all(tensor.is_cuda for tensor in tensors):
        if named.get("non_blocking"):
            machine.refuse_in_capture("a copy")
        else:
            machine.wait("a copy")
    elif name in WAITING:
        machine.wait(name.removeprefix("aten::"))
    elif name == "aten::repeat_interleave" and named.get("output_size") is None and "repeats" in named:
        if isinstance(named["repeats"], Tensor):
            machine.wait("repeat_interleave without output_size")
    elif name in INDEXING:
        indices = [index for index in named["indices"] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            machine.wait("an index by a mask")
        elif not all(index.is_cuda for index in indices):
            machine.wait("an index on the CPU")
