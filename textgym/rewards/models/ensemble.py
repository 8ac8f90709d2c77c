"""RewardEnsemble: several reward models combined, against reward hacking."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from textgym.models.machine.devices import Device
from textgym.rewards.models.reward_model import RewardModel

Reduce = Literal["mean", "min", "mean_minus_std"]


class RewardEnsemble:
    """A reward function that combines the scores of several reward models.

    A text that exploits one member may not exploit the others. The standard deviation between the members is logged as
    the metric `reward_ensemble/std`. Calibrate the members, so that their scores have the same unit.

    Args:
        members: Reward models, or their names or paths.
        reduce: `"mean"`, `"min"` (worst case), or `"mean_minus_std"`, which is the mean minus `k` standard deviations
            between the members (Coste et al., 2023, "Reward Model Ensembles Help Mitigate Overoptimization").
        k: Factor of `"mean_minus_std"`.
        device: Device of the members given by name; `None` uses the environment's device.

    Raises:
        ValueError: If there are no members, or `reduce` is unknown.
    """

    __name__ = "reward_ensemble"

    def __init__(
        self,
        members: Sequence[RewardModel | str | os.PathLike[str]],
        reduce: Reduce = "mean",
        k: float = 1.0,
        device: Device = None,
    ) -> None:
        if not members:
            raise ValueError("an ensemble needs members: give reward models, or their names")
        if reduce not in get_args(Reduce):
            raise ValueError(f"unknown reduce {reduce!r}; use one of {get_args(Reduce)}")
        self.members = [
            m if isinstance(m, RewardModel) else RewardModel.from_pretrained(m, device=device) for m in members
        ]
        follows = device is None
        self.own = [m for m, given in zip(self.members, members, strict=True) if follows and m is not given]
        self.reduce, self.k = reduce, k

    def share_ids_with(self, tokenizer: Any) -> bool:
        """Pass a policy's tokenizer to all members; return whether all of them can read its ids."""
        shared = [member.share_ids_with(tokenizer) for member in self.members]  # a list: all() alone would stop early
        return all(shared)

    def follow_device(self, device: torch.device) -> None:
        """Move the members that were given by name without a device to the environment's device."""
        for member in self.own:
            member.to(device)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        text_ids: Sequence[Sequence[int]] | None = None,
        **ids: Any,
    ) -> list[float]:
        """Return one score per completion; `prompt_ids`, `completion_ids` and `text_ids` go to the members."""
        scores = np.array([member(prompts, completions, text_ids=text_ids, **ids) for member in self.members])  # (M, N)
        std = scores.std(0)  # (N,)
        if log_metric is not None and scores.size:
            log_metric("reward_ensemble/std", float(std.mean()))
        if self.reduce == "min":
            reduced = scores.min(0)
        else:
            reduced = scores.mean(0) - (self.k if self.reduce == "mean_minus_std" else 0.0) * std
        result: list[float] = reduced.tolist()
        return result
