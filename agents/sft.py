"""Supervised fine-tuning on completions, and behaviour cloning of episodes.

    textgym train --agent sft --data rows.jsonl --output-dir runs/sft

`SFT.collate` makes a batch of prompts with their completions, and `SFT.loss` is what an update minimises. The
updates, in micro-batches whose gradients add up, are those of common/supervised_trainer.py.

With transcripts of an environment it clones whoever played them; where the length limit cut them off,
`append_eos=False` does not teach them to end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from textgym.data.completions import encode_completions, load_examples, shorten
from textgym.models.actor_critic import PolicyLike

from .common.supervised import Batch, SupervisedAgent, SupervisedConfig


@dataclass
class SFTConfig(SupervisedConfig):
    """Hyperparameters of supervised fine-tuning."""


class SFT(SupervisedAgent):
    """Supervised fine-tuning on completions.

    Args:
        policy: who learns.
        examples: rows as `textgym.data.completions.load_examples` reads them: `{"prompt", "completion"}`,
            `{"messages"}` or `{"text"}`, strings or conversations. EOS is appended to completions that lack it.
        tokenizer: the policy's: a name, a path or a tokenizer. `None` is the one saved beside the policy's weights.
        config: learning rate, epochs, batches.

    Raises:
        ValueError: no examples, or a row that is none; or a tokenizer that is not the policy's.

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
        """Examples as ids."""
        bos = self.tokenizer.bos_token_id
        encoded = encode_completions(
            load_examples(data),
            self.tokenizer,
            self.config.append_eos,
            add_special_tokens=self.config.add_special_tokens,
        )
        self.texts = [shorten([text.prompt], [text.completion], self.max_length, bos)[0] for text in encoded]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.texts)

    def collate(self, items: Sequence[int]) -> Batch:
        """Examples by their numbers."""
        return self.batch_of(items)

    def weight(self, batch: Batch) -> Tensor:
        """By completion tokens."""
        return batch["response_lengths"].sum()

    def loss(self, log_probs: Tensor, entropies: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """-log pi, a mean over the completion tokens of the batch; prompts are read, not learned."""
        tokens = batch["response_lengths"].sum()
        loss = -log_probs.sum() / tokens
        return loss, {"entropy": entropies.sum() / tokens}
