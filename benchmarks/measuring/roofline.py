"""Roofline of decoding: bytes that a step must read, and the memory bandwidth of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import textgym
from measuring.peers import Figures, synchronize
from textgym.models.decoding.generation import ResponseGenerator, can_capture
from textgym.models.distributions.log_probs import StopRule

BAR = 0.5
"""Minimum share of the measured bandwidth, on a GPU with 1B parameters in bf16 and 64 rows."""


def random_llama(hidden_size: int, layers: int, vocab_size: int, context: int) -> LlamaForCausalLM:
    """Make a random model like Llama 3.2: four query heads per key head, an MLP of fourfold width, tied embeddings."""
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
    """Return the bytes that one step of `rows` rows must read: all weights once, and keys and values of the contexts.

    Of an untied input embedding only the rows of the tokens are read; a tied one is read completely, by the head.
    `context` is the number of tokens attended to, with the newest. Activations and logits are left out.
    """
    config, table = lm.config, lm.get_input_embeddings().weight
    weights = sum(parameter.nbytes for parameter in lm.parameters())  # a tied weight counts once
    if table is not lm.get_output_embeddings().weight:
        weights -= table.nbytes
    weights += rows * config.hidden_size * table.itemsize
    head_size = config.hidden_size // config.num_attention_heads
    state = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * table.itemsize
    return {"weights": weights, "cache": rows * context * state}


def bandwidth(device: torch.device, megabytes: int, repeats: int = 10) -> float:
    """Measure bytes per second of a = b + 2 c on float32 arrays of some MB each: two reads, one write; best of repeats.

    The arrays must be much larger than the device's caches. This is the triad of STREAM (McCalpin, 1995).
    """
    a, b, c = (torch.ones(megabytes * 2**18, device=device) for _ in range(3))
    seconds = [timed(lambda: torch.add(b, c, alpha=2, out=a)) for _ in range(repeats + 1)]
    return 3 * a.nbytes / min(seconds[1:])


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds until the device has finished."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def measure(lm: Any, rows: int, prompt_tokens: int, new_tokens: int, repeats: int, megabytes: int) -> Figures:
    """Return the row of the table. The time of a step is that of a response without its first token, per token.

    "without captured steps" is the time of a step in milliseconds if none is captured as a CUDA graph, as on a CPU.
    """
    policy = textgym.ActorCritic(lm)
    width = prompt_tokens + new_tokens
    prompts = torch.randint(lm.config.vocab_size, (rows, width), device=policy.device)
    lengths = torch.full((rows,), prompt_tokens, device=policy.device)

    def seconds(play: Callable[[], Any], warm_ups: int) -> float:
        """Return the median of repeats after warm-up runs."""
        runs = [timed(play) for _ in range(warm_ups + repeats)]
        return statistics.median(runs[warm_ups:])

    def generate(tokens: int) -> Any:
        return policy.generate(prompts, lengths, tokens, StopRule())

    captures = can_capture(policy.device)
    warm_ups = 2 if captures else 1  # the third run on replays
    first = seconds(lambda: generate(1), warm_ups)
    step = eager_step = (seconds(lambda: generate(new_tokens), warm_ups) - first) / (new_tokens - 1)
    if captures:
        eager = ResponseGenerator(policy, rows, width, new_tokens, StopRule())
        eager_step = (seconds(lambda: eager.generate(prompts, lengths), 1) - first) / (new_tokens - 1)
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
        "without captured steps": eager_step * 1e3,
        "GB/s": sum(read.values()) / step / 1e9,
        "device's GB/s": peak / 1e9,
        "share": share,
        f"bar {BAR}": ("met" if share >= BAR else "missed") if captures else "-",
    }
