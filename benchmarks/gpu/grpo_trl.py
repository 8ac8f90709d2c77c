"""A GRPO update compared with TRL's GRPOTrainer on the embedded model; TRL uses Liger kernels if they are installed."""

from __future__ import annotations

import importlib.util

from figures import skip, start, tell
from grpo_vs_trl import BAR, Config, compare


def main() -> None:
    device = start(__doc__)
    for package in ("trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            skip(f"{package} is missing: put it on PYTHONPATH; benchmarks/measuring/peers.py says how")
    on_gpu = device.type == "cuda"
    liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    config = Config(trl=(), repeats=3, liger=liger)
    if not on_gpu:
        config = Config(trl=(), rows=8, group_size=4, new_tokens=4, repeats=1)
    row = compare(config)
    ours, theirs = row["seconds"], row["peer's seconds"]
    seconds = f"{ours:.3g} s and {theirs:.3g} s; {'with' if liger else 'without'} Liger kernels"
    tell("time over TRL's", row["wall time ratio"], at_most=BAR, judged=on_gpu, note=seconds)
    tell("FLOPs over TRL's", row["FLOPs ratio"], note="operations in Liger's kernels are not counted" if liger else "")


if __name__ == "__main__":
    main()
