"""Hyperparameters of DPO and online DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.settings import Count, NotNegative, Positive, Share

from .policy_gradient import PromptGroupConfig
from .supervised import SupervisedConfig

DPOLoss = Literal["sigmoid", "hinge", "ipo"]


@dataclass(kw_only=True)
class DPOConfig(SupervisedConfig):
    """Hyperparameters of DPO."""

    learning_rate: NotNegative = 1e-5
    """Peak learning rate of AdamW; DPO needs a lower one than supervised fine-tuning."""
    beta: Positive = 0.1
    """Coefficient of the KL penalty: implicit rewards are beta times log-ratios. For "ipo" it is the parameter tau."""
    loss: DPOLoss = "sigmoid"
    """"sigmoid": the loss of DPO; "hinge": zero beyond a margin of 1 (Zhao et al., 2023, SLiC); "ipo": squared distance
    from a margin of 1 / (2 beta) (Azar et al., 2024)."""
    label_smoothing: Share = 0.0
    """For "sigmoid": assumed share of pairs with wrong labels (conservative DPO)."""
    use_probability: bool = False
    """For "sigmoid": train on each pair's `probability` that a rater prefers `chosen`, instead of 1."""


@dataclass(kw_only=True)
class OnlineDPOConfig(PromptGroupConfig):
    """Hyperparameters of online DPO."""

    minibatch_size: Count | None = None
    """Pairs in a minibatch, over all processes; None for all pairs of the rollout."""
    micro_batch_size: Count | None = None
    """Pairs in one forward pass; the gradients add up to that of the minibatch. None for the whole minibatch."""
    loss: DPOLoss = "sigmoid"
    """The loss of a pair, as in DPO: "sigmoid", "hinge" or "ipo"."""
    label_smoothing: Share = 0.0
    """For "sigmoid": assumed share of pairs with wrong labels (conservative DPO)."""
    use_probability: bool = False
    """For "sigmoid": train on the probability of each label by the model of Bradley and Terry (1952), which is the
    sigmoid of the difference of scores, instead of 1. The optimum is then pi_ref exp(score / beta) / Z, as of other
    agents."""
