"""Semantic similarity between a completion and its references."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from textgym.data.messages import Text, check_characters, plain
from textgym.models.architectures.attention import batches_by_length
from textgym.models.loading import load_encoder, resolve
from textgym.models.machine.devices import Device, resolve_device
from textgym.rewards.functions.references import References, listed
from textgym.rewards.models.last_token import pad_right
from textgym.settings import check_settings

BATCH_SIZE = 64


@dataclass
class SemanticSimilarity:
    """Cosine similarity, -1 to 1, of the embeddings of a completion and of the column `references`.

    An embedding is the mean of an encoder's last hidden states (Reimers and Gurevych, 2019), or what the files of
    sentence-transformers beside the encoder say: the first hidden state instead, and after how many tokens a text is
    cut. If a row has several references, the most similar one counts.

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
        pooling = Pooling.of(self.model)
        longest = min(pooling.max_tokens, encoder.config.max_position_embeddings)
        rows = tokenizer(list(texts), truncation=True, max_length=longest).input_ids
        embeddings = torch.empty(len(rows), encoder.config.hidden_size)
        for batch in batches_by_length([len(row) for row in rows], BATCH_SIZE):
            input_ids, lengths = (x.to(self.where) for x in pad_right([rows[index] for index in batch]))
            mask = (torch.arange(input_ids.shape[1], device=self.where) < lengths[:, None]).long()
            hidden = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, T, d)
            mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            pooled = hidden[:, 0] if pooling.first_token else mean
            embeddings[batch] = torch.nn.functional.normalize(pooled, dim=-1).cpu()
        return embeddings


@dataclass(frozen=True)
class Pooling:
    """How sentence-transformers reads an encoder.

    Attributes:
        max_tokens: Tokens after which a text is cut.
        first_token: Whether an embedding is the first hidden state instead of the mean.
    """

    max_tokens: int
    first_token: bool

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, model: str) -> Pooling:
        """Read the files beside an encoder; without them it is the mean of as many tokens as the encoder reads.

        Raises:
            ValueError: If the files ask for another embedding than these two.
        """
        modes = _settings(model, "1_Pooling/config.json")
        chosen = {name for name, value in modes.items() if name.startswith("pooling_mode") and value is True}
        if not chosen <= {"pooling_mode_mean_tokens"} and chosen != {"pooling_mode_cls_token"}:
            raise ValueError(
                f"the encoder {model!r} asks for {sorted(chosen)}, and embeddings here are a mean or a first token: "
                "choose another encoder"
            )
        limit = _settings(model, "sentence_bert_config.json").get("max_seq_length") or sys.maxsize
        return cls(int(limit), chosen == {"pooling_mode_cls_token"})


def _settings(model: str, name: str) -> dict[str, Any]:
    """Return a JSON file of an encoder's folder or repository; empty if there is none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(resolve(model), name, **quiet)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
