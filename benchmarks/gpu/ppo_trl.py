"""A PPO update compared with TRL 1.12's, its last version with PPO: the embedded model, full-length responses."""

from __future__ import annotations

import tempfile

from measuring.figures import note, start, tell
from measuring.trl_versions import libraries_with
from ppo_vs_trl import BARS, Config, compare, load_causal_lm, load_tokenizer


def main() -> None:
    device = start(__doc__)
    libraries = libraries_with("trl.experimental.ppo")
    on_gpu = device.type == "cuda"
    config = Config(repeats=3) if on_gpu else Config(rows=4, new_tokens=4, epochs=1, repeats=1)
    config.peers, config.setting = libraries, "full"  # the setting in which both sides have a separate critic
    with tempfile.TemporaryDirectory() as folder:
        load_causal_lm("tiny").save_pretrained(folder)
        load_tokenizer("tiny").save_pretrained(folder)
        config.model = folder
        row = compare(config)
    seconds = f"{row['our_seconds']:.3g} s and {row['their_seconds']:.3g} s"
    tell("time over TRL's", row["wall_time_ratio"], at_most=BARS["full"], judged=on_gpu, note=seconds)
    tell("FLOPs over TRL's", row["flops_ratio"])
    note("TRL's PPO has no Liger kernels")


if __name__ == "__main__":
    main()
