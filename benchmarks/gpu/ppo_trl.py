"""A PPO update compared with TRL 1.12's, its last version with PPO: the embedded model, full-length responses."""

from __future__ import annotations

import importlib.util
import tempfile

from figures import note, skip, start, tell
from ppo_vs_trl import BARS, Config, compare, load_causal_lm, load_tokenizer


def main() -> None:
    device = start(__doc__)
    if importlib.util.find_spec("trl") is None:
        skip("TRL is missing: put trl-1.12 and datasets on PYTHONPATH; benchmarks/measuring/peers.py says how")
    if importlib.util.find_spec("trl.experimental.ppo") is None:
        skip("this TRL has no PPO: put trl-1.12 on PYTHONPATH; benchmarks/measuring/peers.py says how")
    on_gpu = device.type == "cuda"
    config = Config(repeats=3) if on_gpu else Config(rows=4, new_tokens=4, epochs=1, repeats=1)
    with tempfile.TemporaryDirectory() as folder:
        load_causal_lm("tiny").save_pretrained(folder)
        load_tokenizer("tiny").save_pretrained(folder)
        for name in ("full", "full-shared") if on_gpu else ("full",):
            config.setting, config.model = name, folder
            row = compare(config)
            seconds = f"{row['our_seconds']:.3g} s and {row['their_seconds']:.3g} s"
            tell(f"{name}: time over TRL's", row["wall_time_ratio"], at_most=BARS[name], judged=on_gpu, note=seconds)
    note("TRL's PPO has no Liger kernels")


if __name__ == "__main__":
    main()
