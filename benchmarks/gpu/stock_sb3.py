"""Unmodified PPO of Stable-Baselines3 at 48 tokens: textgym's policy and buffer compared with one without a cache."""

from __future__ import annotations

import warnings

from figures import start, tell
from sb3 import Config, compare

GOAL = 20
"""Goal: times as fast as the plain side."""


def main() -> None:
    device = start(__doc__)
    warnings.filterwarnings("ignore")  # SB3's warnings about minibatches and GPUs
    on_gpu = device.type == "cuda"
    config = Config(rows=16, epochs=4, repeats=2) if on_gpu else Config(rows=4, epochs=1, minibatches=2, repeats=1)
    tokens = 48 if on_gpu else 6
    row = compare(config, tokens)
    at = f"{config.rows} rows, {tokens} tokens"
    tell("plain's time over textgym's", row["wall time ratio"], "times", at_least=GOAL, judged=on_gpu, note=at)
    tell("plain's FLOPs over textgym's", row["FLOPs ratio"], "times")
    tell("positions a trained token", row["positions a token"], note=f"plain: {row['plain']:.1f}")


if __name__ == "__main__":
    main()
