"""Beam search by transformers' `generate`, for evaluation: an agent needs samples of the policy's distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitNormalization, LogitsProcessorList, TemperatureLogitsWarper

from textgym.errors import ConfigError
from textgym.models.architectures.encoder_decoder import split_rows
from textgym.models.distributions.log_probs import StopRule
from textgym.models.distributions.sampling_rules import left_padded

if TYPE_CHECKING:
    from textgym.models.actor_critic import ActorCritic


@torch.no_grad()
def beam_search(
    policy: ActorCritic, prompts: Tensor, lengths: Tensor, max_new_tokens: int, stop: StopRule, num_beams: int
) -> tuple[Tensor, Tensor]:
    """Return the response with the highest mean log-prob per token that a beam search finds, for each prompt.

    Args:
        policy: The policy; its temperature and `rules` apply.
        prompts: `(B, W)`, right-padded.
        lengths: `(B,)`, number of tokens of each prompt.
        max_new_tokens: Maximum length of a response.
        stop: Stop tokens and the minimum length of a response.
        num_beams: Number of beams.

    Returns:
        Tokens `(B, T)`, and lengths with the stop token `(B,)`.

    Raises:
        ConfigError: If the policy samples with `min_p`, because a beam search does not sample.
    """
    lm, rules, start = policy.lm, policy.rules, policy.decoder_start_ids
    if rules.min_p is not None:
        raise ConfigError(
            f"num_beams={num_beams} and min_p={rules.min_p} exclude each other: a beam search does not sample"
        )
    longest = int(lengths.max())
    padding = stop.ids[0] if stop.ids else 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=stop.min_new_tokens or None,
        num_beams=num_beams,
        do_sample=False,
        repetition_penalty=float(rules.repetition_penalty),
        no_repeat_ngram_size=rules.no_repeat_ngram_size or 0,
        eos_token_id=list(stop.ids) or None,
        pad_token_id=padding,
        decoder_start_token_id=start[0] if start else None,
    )
    prompts, lengths = prompts.to(policy.device), lengths.to(policy.device)
    if start:
        rows = split_rows(prompts, lengths, torch.zeros_like(lengths), start, longest, max_new_tokens)
        ids, first = rows.input_ids, len(start)
        inputs = {"decoder_input_ids": rows.decoder_input_ids[:, :first]}
        real = torch.arange(longest, device=policy.device) < lengths[:, None]
    else:
        ids = left_padded(prompts[:, :longest], lengths, torch.full_like(lengths[:1], padding))
        first, inputs = longest, {}
        real = torch.arange(longest, device=policy.device) >= longest - lengths[:, None]
    own = lm.generation_config
    lm.generation_config = config  # otherwise the model's own settings would replace those that are left out here
    try:
        found = lm.generate(
            input_ids=ids,
            attention_mask=real.long(),
            generation_config=config,
            logits_processor=_temperature(policy.temperature),
            **inputs,
        )
    finally:
        lm.generation_config = own
    tokens = found[:, first:]  # (B, T)
    is_stop = torch.isin(tokens, torch.tensor(stop.ids, device=tokens.device, dtype=tokens.dtype))
    before = is_stop.cumsum(1) - is_stop.long()  # stop tokens before each token
    return tokens, (before == 0).sum(1)


def _temperature(temperature: float) -> LogitsProcessorList:
    """Return processors of log-probs, because a beam search has no logits: log p / T is normalised again."""
    if temperature == 1.0:
        return LogitsProcessorList()
    return LogitsProcessorList([TemperatureLogitsWarper(float(temperature)), LogitNormalization()])
