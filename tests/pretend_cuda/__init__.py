"""A pretend CUDA device: to import it patches torch, and then `device="cuda"` gives CPU tensors that carry a tag.

    python -m pytest -p tests.pretend_cuda tests/on_cuda

What CUDA refuses is refused: operations on tensors of several devices, NumPy arrays of CUDA tensors, generators and
generator states of another kind of device, and whatever a CUDA graph's capture does not allow. Operations of a capture
are recorded and replayed as CUDA does it, with their Python values as they were and at the addresses of then.
`machine.syncs` counts, by source line, how often the host waits for the device.

It runs on the CPU's kernels, so results equal the CPU's up to the rounding of matrix products, which are added up in
float64. One seed gives other random numbers than on the CPU, as on a real GPU. The scenarios of `tests/on_cuda` compare
both. It says nothing about kernels, streams, memory or several processes.

Import it before everything else, in a process of its own: `-p` does so, and `tests/test_pretend_cuda.py` starts one.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: an unknown name fails at once, with no request
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from . import factories, generators, graphs, moving, runtime
from .graphs import CUDAGraph
from .machine import machine

for part in (factories, moving, generators, graphs, runtime):
    part.patch()

__all__ = ["CUDAGraph", "machine"]
