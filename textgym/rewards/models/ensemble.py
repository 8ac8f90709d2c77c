"""RewardEnsemble: several reward models as one, against reward hacking."""

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
    """Scores by several reward models, put together: what fools one of them need not fool the others.

    Logs how far the members disagree, as the metric `reward_ensemble/std`. Members ought to be calibrated, so that
    their scores are in one unit.

    Args:
        members: reward models, or names or paths of some.
        reduce: `"mean"`, `"min"` (worst case), or `"mean_minus_std"`, mean - k deviations between the members (Coste et
            al., 2023, "Reward Model Ensembles Help Mitigate Overoptimization").
        k: of `"mean_minus_std"`.
        device: where members that are given by name are; `None`: where the environment is.

    Raises:
        ValueError: no members, or an unknown reduction.
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
        """Tells the members of a policy's tokenizer; returns whether all of them read its ids."""
        shared = [member.share_ids_with(tokenizer) for member in self.members]  # every one is told
        return all(shared)

    def follow_device(self, device: torch.device) -> None:
        """Hears from an environment where it is; members that were named without a device go there."""
        for member in self.own:
            member.to(device)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **ids: Any,
    ) -> list[float]:
        """One score for each completion; `prompt_ids` and `completion_ids` are handed on."""
        scores = np.array([member(prompts, completions, **ids) for member in self.members])  # (M, N)
        deviations = scores.std(0)
        if log_metric is not None and scores.size:
            log_metric("reward_ensemble/std", float(deviations.mean()))
        if self.reduce == "min":
            reduced = scores.min(0)
        else:
            reduced = scores.mean(0) - (self.k if self.reduce == "mean_minus_std" else 0.0) * deviations
        result: list[float] = reduced.tolist()
        return result
