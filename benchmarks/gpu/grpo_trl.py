"""A GRPO update compared with TRL's GRPOTrainer on the embedded model; TRL uses Liger kernels if they are installed."""

from __future__ import annotations

import importlib.util

from grpo_vs_trl import BAR, Config, compare
from measuring.figures import start, tell
from measuring.trl_versions import libraries_with


def main() -> None:
    device = start(__doc__)
    libraries = libraries_with("trl.trainer.grpo_trainer")
    on_gpu = device.type == "cuda"
    liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    config = Config(trl=libraries, repeats=3, liger=liger)
    if not on_gpu:
        config = Config(trl=libraries, rows=8, group_size=4, new_tokens=4, repeats=1)
    row = compare(config, flops=not on_gpu)  # on a GPU the two further processes take too long
    ours, theirs = row["seconds"], row["peer's seconds"]
    seconds = f"{ours:.3g} s and {theirs:.3g} s; {'with' if liger else 'without'} Liger kernels"
    tell("time over TRL's", row["wall time ratio"], at_most=BAR, judged=on_gpu, note=seconds)
    if "FLOPs ratio" in row:
        tell("FLOPs over TRL's", row["FLOPs ratio"])


if __name__ == "__main__":
    main()
