"""Semantic similarity between a completion and its references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from textgym.data.messages import Text, check_characters, plain
from textgym.models.architectures.attention import batches_by_length
from textgym.models.loading import load_encoder
from textgym.models.machine.devices import Device, resolve_device
from textgym.rewards.functions.references import References, listed
from textgym.rewards.models.last_token import pad_right
from textgym.settings import check_settings

BATCH_SIZE = 64


@dataclass
class SemanticSimilarity:
    """Cosine similarity, -1 to 1, of the embeddings of a completion and of the column `references`.

    An embedding is the mean of an encoder's last hidden states (Reimers and Gurevych, 2019). If a row has several
    references, the most similar one counts.

    Attributes:
        model: `"minilm"` (all-MiniLM-L6-v2, extra `similarity`), or the name or path of any encoder.
        device: Device of the model; `None` uses the environment's device.

    Raises:
        ImportError: If the package of `"minilm"` is missing; the message says how to install it.
    """

    model: str = "minilm"
    device: Device = None

    def __post_init__(self) -> None:
        check_settings(self)
        self.where = resolve_device(self.device)

    def follow_device(self, device: torch.device) -> None:
        """Use the environment's device, unless `device` is set."""
        if self.device is None:
            self.where = device

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Score completions."""
        wanted = listed(references)
        texts = plain(completions)

        known = list({*texts, *(reference for row in wanted for reference in row)})  # each text is embedded once
        embeddings = dict(zip(known, self.embed(known), strict=True))

        return [
            max((float(embeddings[text] @ embeddings[reference]) for reference in row), default=None)
            for text, row in zip(texts, wanted, strict=True)
        ]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings of unit length, `(N, d)`, on the CPU."""
        for text in texts:
            check_characters(text)
        encoder, tokenizer = load_encoder(self.model, self.where)
        rows = tokenizer(list(texts), truncation=True, max_length=encoder.config.max_position_embeddings).input_ids
        embeddings = torch.empty(len(rows), encoder.config.hidden_size)
        for batch in batches_by_length([len(row) for row in rows], BATCH_SIZE):
            input_ids, lengths = (x.to(self.where) for x in pad_right([rows[index] for index in batch]))
            mask = (torch.arange(input_ids.shape[1], device=self.where) < lengths[:, None]).long()
            hidden = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, T, d)
            mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            embeddings[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu()
        return embeddings
