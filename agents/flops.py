"""FlopCount: counts floating-point operations, and changes none of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

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
