"""Hyperparameters of Q-learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textgym.settings import Count, NotNegative, Share

from .replay import ReplayConfig


@dataclass(kw_only=True)
class DQNConfig(ReplayConfig):
    """Hyperparameters of Q-learning; beta is `kl_coef` of the environment."""

    backup: Literal["soft", "greedy"] = "soft"
    """Value of a state: "soft" is that of the KL-regularised objective, "greedy" the highest Q-value."""
    prioritised: bool = False
    """Sample episodes with large errors more often (Schaul et al., 2016); weights correct this."""
    priority_exponent: NotNegative = 0.6
    """For `prioritised`: the exponent of priorities; 0 samples uniformly."""
    priority_correction: Share = 0.4
    """For `prioritised`: the exponent of the weights in the first update; it rises linearly to 1, which corrects the
    priorities completely, in the last one."""
    q_scale: float = 1.0
    """For "greedy": initial scale of the language model's log-probs in Q, in reward per nat."""
    double: bool = False
    """For "greedy": the online network chooses the token, the target network its value (van Hasselt et al., 2016)."""
    dueling: bool = True
    """For "greedy": a value of the state plus advantages of tokens, instead of plain outputs (Wang et al., 2016)."""
    noisy: bool = False
    """For "greedy": explore by learned noise on the output weights (Fortunato et al., 2018), in addition to epsilon."""
    n_quantiles: Count = 1
    """For "greedy": number of quantiles of the return (Dabney et al., 2018); 1 for the mean only."""
