"""Time and memory of log-probs and their gradients with a large vocabulary, by the number of tokens in a chunk.

Each chunk reads the whole embedding, so small chunks are slow on a GPU; large chunks need memory. The default is the
choice of `chunk_tokens`.
"""

from __future__ import annotations

import statistics
import time
from unittest import mock

import torch
from measuring.figures import note, start, tell
from torch import Tensor, nn

from textgym.agents.machine.device_limits import peak_memory, reset_peak_memory
from textgym.models.distributions import log_probs

GIB = 2**30


def seconds(hidden: Tensor, head: nn.Linear, actions: Tensor, repeats: int) -> float:
    """The median time of log-probs and their gradients."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        scores, _ = log_probs.token_log_probs(hidden, head, actions, head.out_features)
        scores.sum().backward()
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    device = start(__doc__)
    on_gpu = device.type == "cuda"
    tokens, width, vocab_size = (8192, 1024, 152_064) if on_gpu else (64, 16, 2048)
    powers = range(22, 29) if on_gpu else range(12, 16)
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32

    head = nn.Linear(width, vocab_size, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    actions = torch.randint(vocab_size, (tokens,), device=device)
    chosen = log_probs.chunk_tokens(vocab_size, device)
    note(f"{tokens} tokens, width {width}, {vocab_size} words, {dtype}; chosen: chunks of {chosen} tokens")

    def timed(size: int) -> float:
        with mock.patch.object(log_probs, "chunk_tokens", return_value=size):
            return seconds(hidden, head, actions, repeats=3)

    expected = timed(chosen)
    for power in powers:
        size = max(1, 2**power // vocab_size)
        reset_peak_memory(device)
        took = timed(size)
        memory = f", at most {peak_memory(device) / GIB:.1f} GiB" if on_gpu else ""
        tell(f"chunks of 2^{power} logits: time over the chosen one's", took / expected, note=f"{size} tokens{memory}")


if __name__ == "__main__":
    main()
