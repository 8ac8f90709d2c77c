"""Unmodified PPO of Stable-Baselines3 at 48 tokens: textgym's policy and buffer compared with one without a cache."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from measuring.figures import start, tell
from measuring.roofline import random_llama
from sb3 import Config, compare

from textgym.models.loading import load_tokenizer

GOAL = 20
"""Goal: how many times as fast as the plain side."""


def save_model(folder: Path, hidden_size: int, layers: int, context: int) -> float:
    """Write a random model with the embedded model's tokenizer; return its number of weights."""
    tokenizer = load_tokenizer("tiny")
    torch.manual_seed(0)
    lm = random_llama(hidden_size, layers, len(tokenizer), context)
    lm.config.eos_token_id, lm.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    lm.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(sum(weight.numel() for weight in lm.parameters()))


def main() -> None:
    device = start(__doc__)
    warnings.filterwarnings("ignore")  # SB3's warnings about minibatches and GPUs
    on_gpu = device.type == "cuda"
    config = Config(rows=32, minibatches=8, repeats=1) if on_gpu else Config(rows=4, epochs=1, minibatches=2, repeats=1)
    tokens = 48 if on_gpu else 6
    with tempfile.TemporaryDirectory() as folder:
        # The embedded model is too small for a GPU, where both sides would wait for the host to start kernels.
        weights = save_model(Path(folder), *((1024, 16) if on_gpu else (64, 2)), context=128)
        config.model, config.device = folder, str(device)
        row = compare(config, tokens)
    at = f"{weights / 1e6:.0f}M weights, {config.rows} rows, {tokens} tokens, {config.epochs} epochs, float32"
    tell("plain's time over textgym's", row["wall time ratio"], "times", at_least=GOAL, judged=on_gpu, note=at)
    tell("plain's FLOPs over textgym's", row["FLOPs ratio"], "times")
    tell("positions a trained token", row["positions a token"], note=f"plain: {row['plain']:.1f}")
    tell("positions a trained token of textgym's own PPO", row["own PPO"])


if __name__ == "__main__":
    main()
