"""Best-of-n: sample several completions of a prompt and keep the best scored one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from textgym.models.actor_critic import ActorCritic

from ..common.rollout import merge
from ..runs.evaluation import Samples, generate


def best_of_n(policy: ActorCritic, envs: Any, prompts: Sequence[int], n: int, seed: int) -> Samples:
    """Return the completion with the highest score among n for each prompt; those without a score come last.

    The KL of its distribution to the policy is at most log n - (n - 1) / n nats (Beirami et al., 2024).
    """
    rounds = [generate(policy, envs, prompts, seed + i) for i in range(n)]
    scores = torch.stack([samples.rollout.raw_scores for samples in rounds])  # (n, N)
    best = scores.nan_to_num(nan=-torch.inf).argmax(0).tolist()
    chosen = [rounds[i].rollout[row : row + 1] for row, i in enumerate(best)]
    return Samples(
        [rounds[i].transcripts[row] for row, i in enumerate(best)],
        merge(chosen),
        [rounds[i].finished[row] for row, i in enumerate(best)],
        rounds[0].tokenizer,
    )
