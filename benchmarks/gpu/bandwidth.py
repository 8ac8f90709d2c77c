"""Decoding with 1B weights in bfloat16, 64 rows: its share of the memory bandwidth, measured in the same process."""

from __future__ import annotations

import torch
from measuring.figures import need_bf16, note, skip, start, tell
from measuring.models import BILLION, TOY, fitting, make_model
from measuring.roofline import BAR, measure


def main() -> None:
    device = start(__doc__)
    need_bf16(device)
    on_gpu = device.type == "cuda"
    rows, prompt_tokens, new_tokens = (64, 128, 128) if on_gpu else (4, 8, 8)
    size = fitting(BILLION if on_gpu else TOY, device, bytes_per_weight=4.0, spare=8e9)
    if size is None:
        skip("too little free memory for a model of 50M weights")
    if on_gpu and size != BILLION[0]:
        note(f"a model of {size.parameters / 1e6:.0f}M weights, since one of 1.2B does not fit into free memory")

    lm = make_model(size, prompt_tokens + new_tokens, device, torch.bfloat16)
    row = measure(lm, rows, prompt_tokens, new_tokens, 3 if on_gpu else 1, 2048 if on_gpu else 16)
    parts = f"{row['weights, MB']:.0f} MB of weights and {row['cache, MB']:.0f} MB of keys and values a step"
    tell(
        "share of bandwidth",
        row["share"],
        at_least=BAR,
        judged=on_gpu and size == BILLION[0],
        note=f"{row['parameters, M']:.0f}M weights, {rows} rows; {parts}",
    )
    tell("a step", row["ms/step"], "ms", note="captured" if on_gpu else "")
    tell("a step without captured steps", row["without captured steps"], "ms")
    measured = row["device's GB/s"]
    tell("read by a step", row["GB/s"], "GB/s", note=f"of {measured:.0f} measured")
    tell("response tokens a second", rows / row["ms/step"] * 1e3)


if __name__ == "__main__":
    main()
