"""FlopCount: counts floating-point operations, those of replayed CUDA graphs too, and changes none of them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper


class FlopCount(TorchDispatchMode):
    """Counts matrix products, convolutions and attention by the formulas of `torch.utils.flop_counter`.

    That module's own counter takes some operations apart before it runs them, such as the gradient of SiLU, so that a
    model trains with other roundings while it counts; this one runs everything as it is.

    Attributes:
        by_operation: operations so far, two for each multiply-add, by what did them: "mm", "addmm", "bmm", ...

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
        """All of them."""
        return self.by_operation.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts it."""
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.by_operation[func.overloadpacket.__name__] += formula(*args, **(kwargs or {}), out_val=result)
        return result


_counting: list[FlopCount] = []  # those that are under way


@contextlib.contextmanager
def captured() -> Iterator[Counter[str]]:
    """Count what is captured as a CUDA graph in this block, for `replayed`.

    Counts under way leave it out: what is captured is recorded, and not carried out.
    """
    outer = list(_counting)
    with FlopCount() as own:
        try:
            yield own.by_operation
        finally:
            for count in outer:
                count.by_operation.subtract(own.by_operation)


def replayed(operations: Counter[str]) -> None:
    """Add what `captured` counted to the counts under way, which see nothing of a replay."""
    for count in _counting:
        count.by_operation.update(operations)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    # What torch does not know: attention on the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}
