"""ProcessRewardModel: a reward model that scores every step or every token of a completion."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.data.continuations import decode_continuation
from textgym.models.architectures.attention import batches_by_length
from textgym.models.loading import disable_dropout, freeze, load_classifier
from textgym.models.machine.devices import Device
from textgym.rewards.models.last_token import pad_right
from textgym.rewards.models.reward_model import encodes_alike


class ProcessRewardModel:
    """A token-level reward function that uses a trained token classifier.

    With a separator, such as a line break, a completion is a sequence of steps. Each step is scored at the token that
    completes its separator, or at the last token of the text; all other tokens get 0 (Lightman et al., 2023, "Let's
    Verify Step by Step"). Without a separator every token is scored. A score is the probability of the chosen label, or
    the raw output if the model has only one label.

    Rewards belong to the policy's tokens, so the model must have the policy's tokenizer.

    Args:
        model: Token classifier of transformers. It is frozen and its dropout is turned off.
        tokenizer: The tokenizer of the model.
        separator: Text that ends a step; `None` scores every token.
        label: Index of the label that means that a step is correct.
        batch_size: Number of texts that are scored at once.
        max_length: Maximum number of tokens of prompt and completion, limited by the positions of the model. Longer
            texts lose their beginning, and completion tokens in it get 0.

    Raises:
        ValueError: If the separator is empty, or the model does not have the label.
    """

    __name__ = "process_reward_model"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        separator: str | None = "\n",
        label: int = -1,
        batch_size: int = 64,
        max_length: int = 4096,
    ) -> None:
        if separator == "":
            raise ValueError("the separator is empty: give the text that ends a step, or None to score every token")
        num_labels = int(model.config.num_labels or 1)
        if not -num_labels <= label < num_labels:
            raise ValueError(f"the model has {num_labels} labels and none with the index {label}: choose another label")
        self.model = freeze(disable_dropout(model))
        self.tokenizer, self.separator, self.label, self.batch_size = tokenizer, separator, label, batch_size
        self.max_length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> ProcessRewardModel:
        """Load a trained token classifier from a folder or the hub; `settings` are arguments of the constructor.

        Raises:
            ValueError: If the name is unknown, or the head of the model was never trained.
        """
        model = load_classifier(
            name_or_path,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            trained=True,
            auto_class=AutoModelForTokenClassification,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, **settings)

    def share_ids_with(self, tokenizer: Tokenizer) -> bool:
        """Check that a policy's tokenizer gives the same ids as the model's own.

        Raises:
            ValueError: If it does not.
        """
        if not encodes_alike(tokenizer, self.tokenizer):
            raise ValueError(
                "a process reward model scores the policy's tokens, but its tokenizer differs from the policy's: "
                "train it with the policy's tokenizer, or use a RewardModel, which reads text"
            )
        return True

    def __call__(
        self, *, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[list[float]]:
        """Return a list for each completion with a reward for each of its tokens."""
        pairs = zip(prompt_ids, completion_ids, strict=True)
        rows = [[*prompt, *completion][-self.max_length :] for prompt, completion in pairs]
        rewards: list[list[float]] = [[] for _ in rows]
        for batch in batches_by_length([len(row) for row in rows], self.batch_size):
            scores = self.token_scores(*pad_right([rows[index] for index in batch])).tolist()
            for index, row in zip(batch, scores, strict=True):
                count = len(completion_ids[index])
                read = row[: len(rows[index])][-count:] if count else []
                scored = [0.0] * (count - len(read)) + read
                rewards[index] = self._at_steps(scored, prompt_ids[index], completion_ids[index])
        return rewards

    @torch.no_grad()
    def token_scores(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return scores `(B, T)` of all tokens of right-padded rows; those of padding are meaningless."""
        device = self.model.device
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.long().to(device)).logits.float()
        return logits[..., 0] if logits.shape[-1] == 1 else logits.softmax(-1)[..., self.label]

    def _at_steps(self, scores: list[float], prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
        if self.separator is None:
            return scores
        ends = self._step_ends(prompt_ids, completion_ids, self.separator)
        return [score if token in ends else 0.0 for token, score in enumerate(scores)]

    def _step_ends(self, prompt_ids: Sequence[int], ids: Sequence[int], separator: str) -> set[int]:
        """Return the indices of tokens that complete a separator, and of the last token if it ends a step."""
        ends: set[int] = set()
        seen, last = 0, -1
        # Prefixes are decoded, because a separator may consist of several tokens, or be part of one.
        for token in range(len(ids)):
            count = decode_continuation(self.tokenizer, prompt_ids, ids[: token + 1]).count(separator)
            if count > seen:
                ends.add(token)
                last = token
            seen = count
        before, rest = [*prompt_ids, *ids[: last + 1]], ids[last + 1 :]
        if ids and (not ends or decode_continuation(self.tokenizer, before, rest).strip()):
            ends.add(len(ids) - 1)
        return ends
