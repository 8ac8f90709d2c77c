"""Pretraining texts whose likelihood the policy keeps while it learns from rewards (PPO-ptx; Ouyang et al., 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from textgym.data.completions import encode_completions, load_examples, shorten
from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.positions import position_limit
from textgym.models.sequences import Sequences
from textgym.rewards.models.last_token import pad_right

from ..common.means import masked_mean


class PretrainingTexts:
    """Texts to sample batches from.

    Args:
        path: A .jsonl file of rows with "text", or with "prompt" and "completion", of which the completion counts.
        tokenizer: The policy's tokenizer.
        policy: The policy.
        max_length: Maximum number of tokens of a text.
    """

    def __init__(self, path: str, tokenizer: Any, policy: ActorCritic, max_length: int) -> None:
        limit = position_limit(policy.lm.config)
        longest = max_length if limit is None else min(max_length, limit)
        encoded = encode_completions(load_examples(path), tokenizer)
        bos = tokenizer.bos_token_id
        self.texts = [shorten([text.prompt], [text.completion], longest, bos)[0] for text in encoded]
        self.policy = policy

    def sample(self, count: int, generator: torch.Generator) -> Sequences:
        """Sample texts with replacement; `generator` is on the CPU."""
        chosen = [self.texts[index] for index in torch.randint(len(self.texts), (count,), generator=generator).tolist()]
        sequences = Sequences(
            pad_right([[*text.prompt, *text.completion] for text in chosen])[0],
            torch.tensor([len(text.prompt) for text in chosen]),
            torch.tensor([len(text.completion) for text in chosen]),
            decoder_start=self.policy.decoder_start_ids,
        )
        return sequences.to(self.policy.device)


def negative_log_likelihood(policy: ActorCritic, texts: Sequences) -> Tensor:
    """Return -E[log pi(x_t | x_<t)], the mean over the tokens of pretraining texts, with gradients."""
    log_probs, _ = policy.score_sequences(texts)
    return -masked_mean(log_probs, texts.response_mask)
