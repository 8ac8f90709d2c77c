"""Adam with 8-bit moments compared with 32-bit: peak memory and time of a PPO update. Needs bitsandbytes."""

from __future__ import annotations

import gc
import importlib.util

import torch
from large_update import BYTES_PER_WEIGHT, make_agent, timed_updates
from measuring.figures import need_bf16, note, skip, start, tell
from measuring.models import BILLION, TOY, fitting

from textgym.agents.machine.device_limits import reset_peak_memory


def main() -> None:
    device = start(__doc__)
    if importlib.util.find_spec("bitsandbytes") is None:
        skip("bitsandbytes is missing")
    need_bf16(device)
    on_gpu = device.type == "cuda"
    rows, prompt_tokens, new_tokens = (16, 32, 32) if on_gpu else (4, 4, 4)
    size = fitting(BILLION[1:] if on_gpu else TOY, device, BYTES_PER_WEIGHT, spare=4e9)
    if size is None:
        skip("too little free memory for PPO on a model of 50M weights")

    memory, seconds = {}, {}
    for eight_bit in (False, True):
        reset_peak_memory(device)
        agent = make_agent(size, device, rows, prompt_tokens, new_tokens, eight_bit)
        updates = timed_updates(agent, rows, 2)
        memory[eight_bit] = max(update["memory"] for update in updates)
        seconds[eight_bit] = min(update["optimisation"] for update in updates)
        score = updates[-1]["objective/kl"]
        if score != score:
            raise SystemExit(f"the KL after an update with adam_8bit={eight_bit} is NaN")
        del agent
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    note(f"a model of {size.parameters / 1e6:.0f}M weights, {rows} episodes of {prompt_tokens} + {new_tokens} tokens")
    tell("peak memory, moments in 32 bits", memory[False] / 2**30, "GiB")
    tell("peak memory, moments in 8 bits", memory[True] / 2**30, "GiB")
    tell("less memory by", (memory[False] - memory[True]) / size.parameters, "bytes a weight", note="6 are expected")
    tell("time of the update, 8 bits over 32", seconds[True] / seconds[False])


if __name__ == "__main__":
    main()
