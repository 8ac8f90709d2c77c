"""FlopCount: count floating-point operations, including those of replayed CUDA graphs, without changing results."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper


class FlopCount(TorchDispatchMode):
    """Context manager that counts matrix products, convolutions and attention by torch's formulas.

    `torch.utils.flop_counter.FlopCounterMode` decomposes some operations before it runs them, such as the gradient of
    SiLU, and this changes the rounding. `FlopCount` uses its formulas but runs every operation unchanged.

    Attributes:
        by_operation: Floating-point operations so far by operator ("mm", "addmm", "bmm", ...); a multiply-add counts as
            two.

    >>> with FlopCount() as count:
    ...     product = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> count.total
    60
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_operation: Counter[str] = Counter()

    def __enter__(self) -> Self:
        _counting.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        _counting.remove(self)
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @property
    def total(self) -> int:
        """Total number of floating-point operations."""
        return self.by_operation.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its operations."""
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.by_operation[func.overloadpacket.__name__] += formula(*args, **(kwargs or {}), out_val=result)
        return result


_counting: list[FlopCount] = []  # counters that are active


@contextlib.contextmanager
def captured() -> Iterator[Counter[str]]:
    """Count the operations that are captured as a CUDA graph in this block, for `replayed`.

    They are subtracted from the active counters, because a capture records operations and does not run them.
    """
    outer = list(_counting)
    with FlopCount() as own:
        try:
            yield own.by_operation
        finally:
            for count in outer:
                count.by_operation.subtract(own.by_operation)


def replayed(operations: Counter[str]) -> None:
    """Add operations that `captured` counted to the active counters, because torch does not dispatch a replay."""
    for count in _counting:
        count.by_operation.update(operations)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    # torch's registry has no formulas for attention on the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}
