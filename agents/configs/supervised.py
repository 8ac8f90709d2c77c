"""Hyperparameters of agents that learn from given texts; those of SFT."""

from __future__ import annotations

from dataclasses import dataclass

from textgym.errors import ConfigError
from textgym.settings import Count, NotNegative, OnNonFinite, Positive, Seed, Share, check_settings


@dataclass(kw_only=True)
class SupervisedConfig:
    """Hyperparameters of all agents that learn from given texts."""

    learning_rate: NotNegative = 1e-4
    """Peak learning rate of AdamW; epsilon is 1e-8, torch's default, because warm-up keeps the first updates small."""
    epochs: Positive = 1.0
    """Number of epochs over the data."""
    max_steps: Count | None = None
    """Number of updates; it replaces `epochs`."""
    batch_size: Count = 32
    """Examples, or pairs, in one update, over all processes."""
    micro_batch_size: Count | None = None
    """Examples in one forward pass; the gradients add up to that of the batch. None for the whole batch."""
    warmup: Share = 0.1
    """Share of the updates over which the learning rate increases linearly."""
    anneal_learning_rate: bool = True
    """Whether the learning rate then decreases linearly to zero."""
    adam_8bit: bool = False
    """Keep Adam's two moments in 8 bits each instead of 32; needs bitsandbytes."""
    max_grad_norm: Positive = 1.0
    """Maximum norm of the gradient of an update; larger gradients are scaled down."""
    on_nonfinite: OnNonFinite = "raise"
    """What to do if the loss or the gradient of a step is NaN or infinite: `"raise"` an error, or `"skip"` the step.
    Skipped steps are counted, and more than 10 of the last 100 are an error."""
    max_length: Count = 512
    """Maximum number of tokens of a text, or fewer if the model has fewer positions. A text that is too long loses the
    beginning of its prompt, down to a quarter of this length, and then the end of its completion."""
    allow_faulty_rows: Share = 0.01
    """Largest share of rows with a fault, such as a cut prompt, an empty completion or two equal sides; the data are
    refused if there are more."""
    append_eos: bool = True
    """Append EOS to completions that lack it; use False for texts that a length limit cut off."""
    add_special_tokens: bool = True
    """Whether strings get the tokenizer's BOS; `False` if they were rendered already, so that control tokens in them
    count."""
    bf16: bool = False
    """Run the forward passes in bfloat16 (autocast); log-softmax and losses stay in float32."""
    gradient_checkpointing: bool = False
    """Store only the inputs of layers, and recompute the layers in the backward pass: less memory, more time."""
    seed: Seed = 0
    """Seed of the order of the data."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={self.micro_batch_size}"
            )


@dataclass(kw_only=True)
class SFTConfig(SupervisedConfig):
    """Hyperparameters of supervised fine-tuning."""
