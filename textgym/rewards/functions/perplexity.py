"""Perplexity of a completion under a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.data.continuations import encode_continuations
from textgym.data.messages import Text, check_characters, plain
from textgym.models.architectures.attention import batches_by_length
from textgym.models.loading import load_tokenizer
from textgym.models.machine.devices import Device, resolve_device
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.models.last_token import pad_right
from textgym.rewards.models.reward_model import encodes_alike
from textgym.settings import check_settings

BATCH_SIZE = 64


@dataclass
class Perplexity:
    """Perplexity of a completion given its prompt, under a language model; at least 1, and lower is better.

    It is `None` for a completion without tokens. With `log=True` the value is the mean log-prob per token, which is
    minus the logarithm of the perplexity. Use that as a reward, and perplexity as a metric with weight 0.

    Attributes:
        model: Name or path of the language model.
        log: Whether to return the mean log-prob per token, in nats, instead of the perplexity.
        device: Device of the model; `None` uses the environment's device.
    """

    model: str = "tiny"
    log: bool = False
    device: Device = None
    shared_ids: bool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_settings(self)
        self.where = resolve_device(self.device)

    def follow_device(self, device: torch.device) -> None:
        """Use the environment's device, unless `device` is set."""
        if self.device is None:
            self.where = device

    def share_ids_with(self, tokenizer: Tokenizer) -> bool:
        """Check whether a policy's tokenizer gives the same ids as the model's own, so that ids can be read directly.

        Ids are read only if this holds for all tokenizers that were passed, because one function may serve several
        policies.
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
        text_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Score completions."""
        completion_ids = completion_ids if text_ids is None else text_ids
        if not self.shared_ids or prompt_ids is None or completion_ids is None:
            for text in [*plain(prompts), *plain(completions)]:
                check_characters(text)
            tokenizer = load_tokenizer(self.model)
            pairs = list(zip(plain(prompts), plain(completions), strict=True))
            encoded = encode_continuations(tokenizer, pairs)
            # The first token of a completion needs a context, so an empty prompt becomes EOS.
            prompt_ids = [prompt or [tokenizer.eos_token_id] for prompt, _ in encoded]
            completion_ids = [completion for _, completion in encoded]
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
