"""Bytes that a decoded token has to read, and how fast a device can read at all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import textgym
from measuring.episode_timing import synchronize
from measuring.peers import Figures
from textgym.models.distributions.log_probs import StopRule

BAR = 0.5
"""Of the measured bandwidth, on a GPU at 1B parameters in bf16 with 64 rows."""


def random_llama(hidden_size: int, layers: int, vocab_size: int, context: int) -> LlamaForCausalLM:
    """Of the shape of Llama 3.2: four queries to a key, an MLP four times as wide, one embedding at both ends."""
    heads = max(1, hidden_size // 64)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(shape)


def bytes_per_step(lm: Any, rows: int, context: float) -> dict[str, float]:
    """Bytes that one step of `rows` rows has to read: every weight once, and the keys and values of the contexts.

    An input embedding of its own is not read but for the rows' tokens; one that is the head's too is read as the head.
    `context` counts the tokens attended to, the newest included. What is written, activations and logits, is left out.
    """
    config, table = lm.config, lm.get_input_embeddings().weight
    weights = sum(parameter.nbytes for parameter in lm.parameters())  # names a tied weight once
    if table is not lm.get_output_embeddings().weight:
        weights -= table.nbytes
    weights += rows * config.hidden_size * table.itemsize
    head_size = config.hidden_size // config.num_attention_heads
    state = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * table.itemsize
    return {"weights": weights, "cache": rows * context * state}


def bandwidth(device: torch.device, megabytes: int, repeats: int = 10) -> float:
    """Bytes a second of a = b + 2 c on float32 arrays of so many MB each: two read, one written; the best of repeats.

    The arrays must be many times the size of the device's caches. It is STREAM's triad (McCalpin, 1995).
    """
    a, b, c = (torch.ones(megabytes * 2**18, device=device) for _ in range(3))
    seconds = [timed(lambda: torch.add(b, c, alpha=2, out=a)) for _ in range(repeats + 1)]
    return 3 * a.nbytes / min(seconds[1:])


def timed(run: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def measure(lm: Any, rows: int, prompt_tokens: int, new_tokens: int, repeats: int, megabytes: int) -> Figures:
    """The table's row. A step's time is that of a whole response less that of its first token, over the others."""
    policy = textgym.ActorCritic(lm)
    width = prompt_tokens + new_tokens
    prompts = torch.randint(lm.config.vocab_size, (rows, width), device=policy.device)
    lengths = torch.full((rows,), prompt_tokens, device=policy.device)

    def seconds(tokens: int) -> float:
        """Median of repeats, after two to warm up: a captured step is replayed from the third time on."""
        runs = [timed(lambda: policy.generate(prompts, lengths, tokens, StopRule())) for _ in range(2 + repeats)]
        return statistics.median(runs[2:])

    step = (seconds(new_tokens) - seconds(1)) / (new_tokens - 1)
    read = bytes_per_step(lm, rows, prompt_tokens + new_tokens / 2)  # the mean over the steps
    policy.reset_cache()
    peak = bandwidth(policy.device, megabytes)
    share = sum(read.values()) / step / peak
    return {
        "parameters, M": sum(parameter.numel() for parameter in lm.parameters()) / 1e6,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "rows": rows,
        "mean context": prompt_tokens + new_tokens / 2,
        "weights, MB": read["weights"] / 1e6,
        "cache, MB": read["cache"] / 1e6,
        "ms/step": step * 1e3,
        "GB/s": sum(read.values()) / step / 1e9,
        "device's GB/s": peak / 1e9,
        "share": share,
        f"bar {BAR}": ("met" if share >= BAR else "missed") if policy.device.type == "cuda" else "-",
    }
