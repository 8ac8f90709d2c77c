"""Rewards by a model's opinion of a text that no one trained for it: similarity of meaning, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.data.messages import Text, plain
from textgym.models.attention import batches_by_length
from textgym.models.devices import Device, resolve_device
from textgym.models.loading import load_encoder, load_tokenizer
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.last_token import pad_right
from textgym.rewards.reward_model import encodes_alike

BATCH_SIZE = 64


@dataclass
class SemanticSimilarity:
    """Cosine, -1 to 1, between the meanings of a completion and of the column `references`, the best over a row's.

    A meaning is the mean of an encoder's last hidden states (Reimers and Gurevych, 2019).

    Attributes:
        model: `"minilm"` (all-MiniLM-L6-v2, extra `similarity`), or the name or path of any encoder.
        device: where it is; `None`: where the environment is.

    Raises:
        ImportError: `"minilm"` without its package; the message is the pip line.
    """

    model: str = "minilm"
    device: Device = None

    def __post_init__(self) -> None:
        self.where = resolve_device(self.device)

    def follow_device(self, device: torch.device) -> None:
        """Hears from an environment where it is, and goes there unless the caller has chosen a device."""
        if self.device is None:
            self.where = device

    def __call__(
        self, completions: Sequence[Text], references: Sequence[str | Sequence[str] | None], **_: Any
    ) -> list[float | None]:
        """Scores completions."""
        wanted = [[row] if isinstance(row, str) else list(row or ()) for row in references]
        texts = plain(completions)
        meanings = dict(
            zip(known := list({*texts, *(t for row in wanted for t in row)}), self.embed(known), strict=True)
        )
        return [
            max((float(meanings[text] @ meanings[reference]) for reference in row), default=None)
            for text, row in zip(texts, wanted, strict=True)
        ]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Meanings `(N, d)`, of length 1, on the CPU."""
        encoder, tokenizer = load_encoder(self.model, self.where)
        rows = tokenizer(list(texts), truncation=True, max_length=encoder.config.max_position_embeddings).input_ids
        meanings = torch.empty(len(rows), encoder.config.hidden_size)
        for batch in batches_by_length([len(row) for row in rows], BATCH_SIZE):
            input_ids, lengths = (x.to(self.where) for x in pad_right([rows[index] for index in batch]))
            mask = (torch.arange(input_ids.shape[1], device=self.where) < lengths[:, None]).long()
            hidden = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, T, d)
            mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            meanings[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu()
        return meanings


@dataclass
class Perplexity:
    """Perplexity of a completion's tokens after its prompt, under a language model: 1 is certain, lower is better.

    `None` for a completion without tokens. With `log` it is minus the logarithm, the mean log-prob of a token, which is
    the form to reward; perplexity itself is one to report, with weight 0.

    Attributes:
        model: a name or path, as every model's.
        log: mean log-prob, in nats a token, in place of perplexity.
        device: where it is; `None`: where the environment is.
    """

    model: str = "tiny"
    log: bool = False
    device: Device = None
    shared_ids: bool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.where = resolve_device(self.device)

    def follow_device(self, device: torch.device) -> None:
        """Hears from an environment where it is, and goes there unless the caller has chosen a device."""
        if self.device is None:
            self.where = device

    def share_ids_with(self, tokenizer: Tokenizer) -> bool:
        """Tells it of a policy's tokenizer; returns whether that gives the same ids as the model's own.

        Ids are read in place of texts only while all tokenizers it was told of do.
        """
        same = encodes_alike(tokenizer, load_tokenizer(self.model))
        self.shared_ids = same and self.shared_ids is not False
        return same

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Scores completions."""
        if not self.shared_ids or prompt_ids is None or completion_ids is None:
            tokenizer = load_tokenizer(self.model)
            prompt_ids = [tokenizer(text).input_ids or [tokenizer.eos_token_id] for text in plain(prompts)]
            completion_ids = [tokenizer(text, add_special_tokens=False).input_ids for text in plain(completions)]
        scores: list[float | None] = [None] * len(completion_ids)
        kept = [index for index, ids in enumerate(completion_ids) if len(ids)]
        rows = [[*prompt_ids[index], *completion_ids[index]] for index in kept]
        for batch in batches_by_length([len(row) for row in rows], BATCH_SIZE):
            input_ids, lengths = pad_right([rows[index] for index in batch])
            starts = torch.tensor([len(prompt_ids[kept[index]]) for index in batch])
            sequences = Sequences(input_ids, starts, lengths - starts).to(self.where)
            totals = _language_model(self.model, self.where).sequence_log_probs(sequences).sum(1)
            log_probs = totals.cpu() / (lengths - starts)
            for index, score in zip(batch, (log_probs if self.log else (-log_probs).exp()).tolist(), strict=True):
                scores[kept[index]] = score
        return scores


@lru_cache(maxsize=4)
def _language_model(name: str, device: torch.device) -> TokenModel:
    return TokenModel.load(name, device=device)
