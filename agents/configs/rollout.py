"""Hyperparameters of all agents that learn from rollouts: the optimiser and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from textgym.models.machine.schedules import learning_rate_factor
from textgym.settings import (
    Check,
    Count,
    NotNegative,
    OnNonFinite,
    Positive,
    Seed,
    Share,
    check_settings,
)


def _is_optimizer(name: str) -> bool:
    if name in ("AdamW", "Adam", "SGD", "RMSprop"):
        return True
    import torch  # here, since help shows the default, and torch takes seconds to load

    found = getattr(torch.optim, name, None)
    # LBFGS evaluates the loss several times in a step.
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")


OptimizerName = Annotated[str, Check("the name of a class of torch.optim, other than LBFGS", _is_optimizer)]


@dataclass(kw_only=True)
class OptimizerConfig:
    """Hyperparameters of the optimiser of all agents that learn from rollouts."""

    learning_rate: NotNegative = 1e-4
    """Peak learning rate."""
    warmup: Share = 0.0
    """Share of the updates in which the learning rate rises linearly to its peak."""
    anneal_learning_rate: bool = True
    """Whether the learning rate decreases to zero over `total_episodes`, after the warm-up."""
    annealing: Literal["linear", "cosine"] = "linear"
    """How the learning rate decreases."""
    optimizer: OptimizerName = "AdamW"
    """Class of torch.optim, such as "AdamW", "Adam", "SGD" or "RMSprop"."""
    optimizer_options: dict[str, float] = field(default_factory=dict)
    """Further arguments of the optimiser's class, such as momentum."""
    weight_decay: NotNegative = 0.0
    """Weight decay."""
    adam_epsilon: NotNegative = 1e-5
    """Epsilon of Adam and its variants; with a small one the first updates are large."""
    adam_8bit: bool = False
    """Keep AdamW's two moments in 8 bits each instead of 32; needs bitsandbytes."""
    max_grad_norm: Positive = 1.0
    """Maximum norm of the gradient of a minibatch; larger gradients are scaled down."""

    def __post_init__(self) -> None:
        check_settings(self)

    def learning_rate_factor(self, update: float, num_updates: float) -> float:
        """Return what the peak learning rate is multiplied by in an update, from 0, of so many."""
        decay = self.annealing if self.anneal_learning_rate else "none"
        return learning_rate_factor(update, num_updates, self.warmup, decay)


@dataclass(kw_only=True)
class RolloutAgentConfig(OptimizerConfig):
    """Hyperparameters of all agents that learn from rollouts."""

    episodes_per_update: Count = 128
    """Episodes collected before each update, over all processes. The last update of a run has what is left of its
    total. If the number of rows does not divide it, some rows of the last round are generated and scored, and not
    used."""
    on_nonfinite: OnNonFinite = "raise"
    """What to do if the loss or the gradient of a step is NaN or infinite: `"raise"` an error, or `"skip"` the step.
    Skipped steps are counted, and more than 10 of the last 100 are an error."""
    seed: Seed = 0
    """Seed of prompts, sampling and minibatches."""
    bf16: bool = False
    """Run the forward passes of the update in bfloat16 (autocast); log-softmax and losses stay in float32. bfloat16 has
    8 bits of precision, so the rounding error of a logit between 8 and 16 is up to 0.03, and every layer adds its own.
    On the embedded model the mean error of a log-prob is 0.01 to 0.02 nats. On any processor expect less than 0.03 on
    average, less than 0.15 for 99% of the tokens and less than 0.5 for all; errors are proportional to the logits. The
    ratios in the first step differ from 1 by as much, with a mean of 1.00, and few are outside a clip range of 0.2. The
    error of the gradient is less than 5% of its norm (`python benchmarks/bf16.py`)."""
    gradient_checkpointing: bool = False
    """Store only the inputs of layers, and recompute the layers in the backward pass: less memory, more time."""
