"""Decoding compared with transformers' `generate`, with and without CUDA graphs: a small and a larger model."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measuring.figures import start, tell
from measuring.models import Size, save_model
from measuring.roofline import timed
from rollout import BARS, Config, compare

from textgym.models.actor_critic import ActorCritic
from textgym.models.decoding.generation import ResponseGenerator
from textgym.models.distributions.log_probs import StopRule


def beside_generate(name: str, config: Config, judged: bool, ways: int = 2) -> None:
    """Rollouts by `policy.generate` and by `policy.act`, a token at a time, over `generate` on the same prompts.

    Args:
        name: Name of the model.
        config: Model and sizes.
        judged: Whether the goal is checked.
        ways: 1 for `policy.generate` alone.
    """
    for row in itertools.islice(compare(config, flops=False), ways):
        goal = BARS["cuda"] if row["ours"] == "write" else None
        size = f"{config.rows} rows, {config.new_tokens} tokens"
        ours, theirs = row["seconds"], row["generate's seconds"]
        spread = f"{row['least']:.2f} to {row['most']:.2f}; {ours:.3g} s and {theirs:.3g} s"
        tell(
            f"{name}: {row['ours']}, time over generate's",
            row["wall time ratio"],
            at_most=goal,
            judged=judged,
            note=f"{size}; {spread}",
        )


def captured(name: str, config: Config) -> None:
    """Tell the tokens per second with captured steps, and their ratio to those without them."""
    policy = ActorCritic.from_pretrained(config.model, device=config.device)
    width = config.prompt_tokens + config.new_tokens
    prompts = torch.randint(3, 300, (config.rows, width), device=policy.device)
    lengths = torch.full((config.rows,), config.prompt_tokens, device=policy.device)
    stop = StopRule()
    eager = ResponseGenerator(policy, config.rows, width, config.new_tokens, stop)
    seconds: dict[str, list[float]] = {"captured": [], "eager": []}
    policy.generate(prompts, lengths, config.new_tokens, stop)
    for _ in range(1 + config.repeats):
        seconds["captured"].append(timed(lambda: policy.generate(prompts, lengths, config.new_tokens, stop)))
        seconds["eager"].append(timed(lambda: eager.generate(prompts, lengths)))
    fast, slow = (statistics.median(column[1:]) for column in seconds.values())  # without the first, which captures
    tokens = config.rows * config.new_tokens
    tell(
        f"{name}: response tokens a second",
        tokens / fast,
        note="captured steps" if policy.device.type == "cuda" else "",
    )
    tell(f"{name}: the same without captured steps", tokens / slow)
    tell(f"{name}: captured over eager", slow / fast, "times")


def main() -> None:
    device = start(__doc__)
    on_gpu = device.type == "cuda"
    kind = "cuda" if on_gpu else "cpu"
    config = Config(device=kind, model="tiny", rows=64, prompt_tokens=16, new_tokens=128, repeats=3)
    if not on_gpu:
        config = replace(config, rows=4, new_tokens=8, repeats=1)
    beside_generate("embedded model, float32", config, judged=on_gpu)
    captured("embedded model, float32", config)

    size = Size(512, 24, 48_000) if on_gpu else Size(64, 2, 500)
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, config.prompt_tokens + config.new_tokens, Path(folder), torch.float32)
        config = replace(config, model=folder)
        beside_generate(f"random model of {size.parameters / 1e6:.0f}M", config, judged=on_gpu, ways=1)
        captured(f"random model of {size.parameters / 1e6:.0f}M", config)


if __name__ == "__main__":
    main()
