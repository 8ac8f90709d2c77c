"""Supervised fine-tuning on completions, and behaviour cloning of episodes.

    textgym train --agent sft --data rows.jsonl --output-dir runs/sft

`SFT.collate` makes a batch of prompts with their completions, and `SFT.loss` is the loss of an update. The updates,
with gradient accumulation, are in common/supervised_trainer.py.

With transcripts of an environment it clones the policy that generated them. If the length limit cut them off, use
`append_eos=False`, or the model learns to end texts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from textgym.data.completions import placed_examples, read_examples
from textgym.models.actor_critic import PolicyLike

from .common.supervised import Batch, SupervisedAgent
from .configs.supervised import SFTConfig, SupervisedConfig


class SFT(SupervisedAgent):
    """Supervised fine-tuning on completions.

    Args:
        policy: The policy.
        examples: Rows of `textgym.data.completions.load_examples`: `{"prompt", "completion"}`, `{"messages"}` or
            `{"text"}`, strings or conversations. EOS is appended to completions that lack it.
        tokenizer: The policy's tokenizer: a name, a path or a tokenizer. `None` for the one that is saved with the
            policy's weights.
        config: Hyperparameters.

    Raises:
        ValueError: If there are no examples, a row is not an example, or the tokenizer is not the policy's.
        DataError: If too many rows have a fault, such as a cut prompt.

    >>> from textgym import ActorCritic
    >>> from textgym.agents import SFT
    >>> rows = [{"prompt": "The film is", "completion": " a joy."}, {"prompt": "It is", "completion": " great."}]
    >>> SFT(ActorCritic.from_pretrained("tiny"), rows).learn().updates
    1
    """

    config_class: ClassVar[type[SupervisedConfig]] = SFTConfig
    config: SFTConfig

    def __init__(self, policy: PolicyLike, examples: Any, tokenizer: Any = None, config: Any = None) -> None:
        super().__init__(policy, examples, tokenizer, config)

    def read(self, data: Any) -> None:
        """Encode the examples."""
        self.texts, faults = read_examples(placed_examples(data), self.reading)
        faults.check(self.config.allow_faulty_rows)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.texts)

    def collate(self, items: Sequence[int]) -> Batch:
        """Return the examples with these indices."""
        return self.batch_of(items)

    def weight(self, batch: Batch) -> Tensor:
        """Return the number of completion tokens."""
        return batch["response_lengths"].sum()

    def loss(self, log_probs: Tensor, entropies: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of -log pi over the completion tokens of the batch; prompt tokens have no loss."""
        tokens = batch["response_lengths"].sum()
        loss = -log_probs.sum() / tokens
        return loss, {"entropy": entropies.sum() / tokens}
