"""BERTScore: how well the tokens of a completion and of its references match, by an encoder's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from textgym.data.messages import Text, check_characters, plain
from textgym.models.loading import resolve
from textgym.models.machine.devices import Device, resolve_device
from textgym.rewards.functions.references import References, listed
from textgym.settings import Count, check_settings


@dataclass
class BertScore:
    """F1 of BERTScore (Zhang et al., 2020), as computed by the package bert-score without idf and rescaling.

    Each token is matched with the most similar token of the other text, by the cosine of their hidden states: recall is
    the mean over the tokens of the reference, precision over those of the completion. Of several references the best
    one counts. An empty text matches only another one.

    Attributes:
        model: Name or path of an encoder, such as a folder with roberta-large.
        num_layers: The layer whose hidden states are compared; `None` for the one that bert-score recommends for a
            model or folder of this name, or the last one.
        device: Device of the model; `None` uses the environment's device.
    """

    model: str
    num_layers: Count | None = None
    device: Device = None

    def __post_init__(self) -> None:
        check_settings(self)
        self.where = resolve_device(self.device)

    def follow_device(self, device: torch.device) -> None:
        """Use the environment's device, unless `device` is set."""
        if self.device is None:
            self.where = device

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Score completions.

        Raises:
            ImportError: If bert-score is missing; the message says how to install it.
        """
        rows = list(zip(plain(completions), listed(references), strict=True))
        for text in {text for completion, wanted in rows for text in (completion, *wanted)}:
            check_characters(text)
        couples = dict.fromkeys((completion, text) for completion, wanted in rows for text in wanted)
        scores = {couple: float(couple[0].strip() == couple[1].strip()) for couple in couples}
        compared = [couple for couple in couples if all(text.strip() for text in couple)]
        if compared:
            f1 = _scorer(self.model, self.num_layers, self.where).score(*map(list, zip(*compared, strict=True)))[2]
            scores |= dict(zip(compared, f1.tolist(), strict=True))
        return [max((scores[completion, text] for text in wanted), default=None) for completion, wanted in rows]


@lru_cache(maxsize=2)
def _scorer(model: str, num_layers: int | None, device: torch.device) -> Any:
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
    except ImportError as error:
        raise ImportError("BertScore needs the package bert-score: pip install bert-score") from error
    path = resolve(model)
    config = AutoConfig.from_pretrained(path)
    layers = num_layers or model2layers.get(model) or model2layers.get(Path(model).name) or config.num_hidden_layers
    scorer = BERTScorer(path, num_layers=layers, device=str(device), use_fast_tokenizer=True)
    # Tokenizers may not know how many tokens the encoder reads, and longer texts have no positions.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, config.max_position_embeddings)
    return scorer
