"""Decoding compared with vLLM: response tokens per second of a random model in bfloat16, 64 rows."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring.figures import need_bf16, skip, start, tell
from measuring.models import Size, save_model
from measuring.roofline import timed

from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule

GOAL = 0.9
"""Goal: tokens a second, as a share of vLLM's."""


def main() -> None:
    device = start(__doc__)
    if importlib.util.find_spec("vllm") is None:
        skip("vLLM is missing")
    if device.type != "cuda":
        skip("vLLM is measured on a GPU alone")
    need_bf16(device)
    import vllm

    rows, prompt_tokens, new_tokens, repeats = 64, 16, 128, 3
    size = Size(512, 24, 48_000)
    prompts = torch.randint(3, size.vocab_size, (rows, prompt_tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, 2 * (prompt_tokens + new_tokens), Path(folder), torch.bfloat16)

        policy = ActorCritic.from_pretrained(folder, dtype=torch.bfloat16, device=device)
        padded = torch.nn.functional.pad(prompts, (0, new_tokens)).to(device)
        lengths = torch.full((rows,), prompt_tokens, device=device)
        ours = [timed(lambda: policy.generate(padded, lengths, new_tokens, StopRule())) for _ in range(2 + repeats)]
        policy.reset_cache()

        engine: Any = vllm.LLM(
            model=folder,
            dtype="bfloat16",
            gpu_memory_utilization=0.4,
            max_num_seqs=rows,
            enable_prefix_caching=False,  # each repetition has the same prompts
        )
        sampling = vllm.SamplingParams(
            temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0
        )
        inputs = [{"prompt_token_ids": row} for row in prompts.tolist()]
        theirs = [timed(lambda: engine.generate(inputs, sampling, use_tqdm=False)) for _ in range(1 + repeats)]

    mine, peer = statistics.median(ours[2:]), statistics.median(theirs[1:])
    work = f"{size.parameters / 1e6:.0f}M weights, {rows} rows, {new_tokens} tokens"
    tell("tokens a second over vLLM's", peer / mine, at_least=GOAL, note=work)
    tell("response tokens a second", rows * new_tokens / mine)
    tell("vLLM's", rows * new_tokens / peer, note=f"vLLM {vllm.__version__}")


if __name__ == "__main__":
    main()
