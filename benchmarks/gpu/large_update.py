"""One PPO update of a model with 1.2B weights, with passes in bfloat16: time, memory, tokens, share of peak FLOPs.

Weights, gradients and Adam's two moments are float32, 16 bytes per weight; the frozen reference adds 4.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import gymnasium as gym
import torch
from measuring.figures import need_bf16, note, skip, start, tell
from measuring.models import BILLION, TOY, Size, fitting, make_model, word_prompts, word_tokenizer
from measuring.peers import count_flops, synchronize

from textgym.agents import PPO, PPOConfig
from textgym.agents.machine.device_limits import peak_flops, peak_memory, reset_peak_memory
from textgym.models.actor_critic import ActorCritic

BYTES_PER_WEIGHT = 20.0
SHEET_TERAFLOPS = {"B200": 2250, "H200": 989.4, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989.4, "A100": 312}
"""TFLOP/s of dense bfloat16 products by part of the GPU's name; longer names come first."""


def make_agent(
    size: Size, device: torch.device, rows: int, prompt_tokens: int, new_tokens: int, eight_bit: bool = False
) -> PPO:
    """Make PPO with a random model and a free reward; one epoch of two minibatches, responses of full length."""
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=rows,
        prompts=word_prompts(rows, prompt_tokens, size.vocab_size),
        tokenizer=word_tokenizer(size.vocab_size),
        reward=lambda completions: [float(row % 2) for row in range(len(completions))],
        kl_mode="deferred",
        kl_coef=0.05,
        max_prompt_tokens=prompt_tokens,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        device=str(device),
    )
    config = PPOConfig(
        episodes_per_update=rows,
        minibatch_size=rows // 2,
        micro_batch_size=max(1, rows // 8),
        num_epochs=1,
        learning_rate=1e-6,
        bf16=True,
        adam_8bit=eight_bit,
    )
    return PPO(ActorCritic(make_model(size, prompt_tokens + new_tokens, device, torch.float32)), envs, config)


def timed_updates(agent: PPO, rows: int, count: int) -> list[dict[str, float]]:
    """Return seconds and memory of several updates after a warm-up; steps are captured from the second update on.

    `seconds` is the time of a rollout and its update; `optimisation` is that of `agent.update` alone, without the
    reference's pass, which `time/update_s` includes.
    """
    figures: list[dict[str, float]] = []
    clock = {"started": 0.0, "optimisation": 0.0}
    update: Callable[..., Any] = agent.update

    def timed_update(*arguments: Any) -> Any:
        synchronize()
        started = time.perf_counter()
        metrics = update(*arguments)
        synchronize()
        clock["optimisation"] = time.perf_counter() - started
        return metrics

    def note_update(_: Any, metrics: dict[str, float]) -> None:
        synchronize()
        seconds = time.perf_counter() - clock["started"]
        memory = peak_memory(agent.policy.device)
        figures.append({**metrics, "seconds": seconds, "optimisation": clock["optimisation"], "memory": memory})
        reset_peak_memory(agent.policy.device)
        clock["started"] = time.perf_counter()

    clock["started"] = time.perf_counter()
    with mock.patch.object(agent, "update", timed_update):
        agent.learn(agent.episodes + rows * (1 + count), callback=[note_update])
    return figures[1:]


def flops_of_update(agent: PPO, rows: int) -> int:
    """Count the operations of `agent.update`, without rollout and reference, in one more update: counting is slow."""
    counted: list[int] = []
    update: Callable[..., Any] = agent.update

    def counting(*arguments: Any) -> Any:
        result: list[Any] = []
        counted.append(count_flops(lambda: result.append(update(*arguments))))
        return result[0]

    with mock.patch.object(agent, "update", counting):
        agent.learn(agent.episodes + rows)
    return counted[0]


def main() -> None:
    device = start(__doc__)
    need_bf16(device)
    on_gpu = device.type == "cuda"
    rows, prompt_tokens, new_tokens = (64, 128, 128) if on_gpu else (4, 4, 4)
    sizes = BILLION if on_gpu else TOY
    while True:
        size = fitting(sizes, device, BYTES_PER_WEIGHT, spare=8e9)
        if size is None:
            skip("too little free memory for PPO on a model of 50M weights")
        if memory_suffices(size, device, rows, prompt_tokens, new_tokens):
            return
        gc.collect()  # here, where no exception keeps the agent alive
        torch.cuda.empty_cache()
        note(f"out of memory with {size.parameters / 1e6:.0f}M weights: a smaller model is next")
        sizes = sizes[sizes.index(size) + 1 :]


def memory_suffices(size: Size, device: torch.device, rows: int, prompt_tokens: int, new_tokens: int) -> bool:
    """Measure a model; return whether its memory was enough."""
    try:
        measure(size, device, rows, prompt_tokens, new_tokens)
    except (torch.OutOfMemoryError, MemoryError):  # `learn` raises a MemoryError, which says what used the memory
        return False
    return True


def measure(size: Size, device: torch.device, rows: int, prompt_tokens: int, new_tokens: int) -> None:
    agent = make_agent(size, device, rows, prompt_tokens, new_tokens)
    trained = sum(weight.numel() for weight in agent.policy.parameters())
    updates = timed_updates(agent, rows, 2)
    seconds = min(update["seconds"] for update in updates)
    rollout = min(update["time/rollout_s"] for update in updates)
    optimisation = min(update["optimisation"] for update in updates)
    work = f"{trained / 1e6:.0f}M weights, {rows} episodes of {prompt_tokens} + {new_tokens} tokens"
    tell("an update with its rollout", seconds, "s", note=work)
    tell("of it the rollout", rollout, "s", note="float32 weights are decoded without TF32")
    tell("peak memory", max(update["memory"] for update in updates) / 2**30, "GiB")
    tell("response tokens a second", rows * new_tokens / seconds)

    flops = flops_of_update(agent, rows)
    tell("of it two steps of the optimiser", optimisation, "s", note="two minibatches, forward and backward")
    tell("operations of these", flops / 1e12, "TFLOP")
    on_gpu = device.type == "cuda"
    peak = peak_flops(device, torch.bfloat16 if on_gpu else torch.float32, 10 if on_gpu else 1).flops
    tell("share of the measured peak FLOPs", flops / optimisation / peak, note=f"of {peak / 1e12:.3g} TFLOP/s")
    if (sheet := sheet_peak(device)) is not None:
        share = flops / optimisation / sheet
        tell("share of the data sheet's peak FLOPs", share, note=f"of {sheet / 1e12:.4g} TFLOP/s in bfloat16")


def sheet_peak(device: torch.device) -> float | None:
    """Return the FLOP/s of dense bfloat16 products by the data sheet of a GPU; `None` for one that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for part, peak in SHEET_TERAFLOPS.items() if part in name), None)


if __name__ == "__main__":
    main()
