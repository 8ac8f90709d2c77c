"""continuations: what a policy writes after given texts, as texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from textgym.data.continuations import decode_continuation
from textgym.data.encoding import encode
from textgym.errors import ConfigError
from textgym.models.architectures.positions import position_limit
from textgym.models.decoding.contexts import read_contexts
from textgym.models.distributions.sampling_rules import SamplingRules
from textgym.models.fitting import check_tokenizer, stop_ids, tokenizer_of
from textgym.models.loading import load_tokenizer
from textgym.models.token_model import TokenModel
from textgym.settings import Count, Positive, PositiveShare, Seed, check_arguments


@check_arguments
def continuations(
    policy: Any,
    texts: Sequence[Any],
    max_new_tokens: Count = 64,
    *,
    deterministic: bool = False,
    temperature: Positive | None = None,
    top_k: Count | None = None,
    top_p: PositiveShare | None = None,
    rules: SamplingRules | None = None,
    stop: Sequence[str] = (),
    seed: Seed | None = None,
    tokenizer: Any = None,
) -> list[str]:
    """Return what a policy writes after each text, without the text and without what ends it.

    It ends with the tokenizer's EOS, a stop token of the model's generation config or a string of `stop`, or is cut
    after `max_new_tokens`.

    Args:
        policy: An `ActorCritic`.
        texts: Strings, or conversations as lists of messages, which are continued by the assistant's next message.
        max_new_tokens: Maximum number of tokens.
        deterministic: Whether to take the most likely token at every step instead of sampling.
        temperature: Divides the logits; `None` for the policy's own, which it is trained with.
        top_k: Sample from the most likely tokens alone, so many; `None` for all.
        top_p: Sample from the most likely tokens alone, as few as have this probability together; `None` for all.
        rules: Minimum probability and penalties of repetition; `None` for the policy's own.
        stop: Strings that end a text, and are not part of it.
        seed: Seed of the sampling. `None` for random numbers of the policy's generator, as in training.
        tokenizer: The policy's tokenizer, or its name; `None` for the one that is saved beside its weights.

    Raises:
        ConfigError: If no tokenizer is known, or a text has no room for `max_new_tokens`.
    """
    tokenizer = _tokenizer(policy, tokenizer)
    prompts = encode(texts, tokenizer, add_generation_prompt=True, add_eos=bool(policy.decoder_start_ids))
    _check_room(policy, prompts, max_new_tokens)
    warpers: list[Any] = [] if top_k is None else [TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None else [TopPLogitsWarper(float(top_p))]
    tempered = policy.temperature if temperature is None else float(temperature)
    distribution = replace(policy.distribution(None), temperature=tempered)
    rules = policy.rules if rules is None else rules
    generator = policy.generator if seed is None else torch.Generator(policy.device).manual_seed(seed)
    ends = {tokenizer.eos_token_id, *stop_ids(policy.lm)}

    responses: list[list[int]] = [[] for _ in prompts]
    written = [""] * len(prompts)
    alive = [True] * len(prompts)
    for _ in range(max_new_tokens):
        observation = _observation(policy, prompts, responses, max_new_tokens)
        contexts, _ = read_contexts(observation, policy.device)
        logits = rules.log_probs(policy.next_logits(observation).float(), distribution, *contexts.tokens)  # (B, V)
        for warper in warpers:
            logits = warper(None, logits)
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        tokens = logits.argmax(-1) if deterministic else sampled
        for row, token in enumerate(tokens.tolist()):
            if not alive[row]:
                continue
            if token in ends:
                alive[row] = False
                continue
            responses[row].append(token)
            if stop:
                text = _text(policy, tokenizer, prompts[row], responses[row])
                found = [text.index(end) for end in stop if end in text]
                written[row], alive[row] = text[: min(found, default=len(text))], not found
        if not any(alive):
            break
    policy.reset_cache()
    if stop:
        return written
    return [_text(policy, tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]


def is_one_text(prompts: Any) -> bool:
    """Whether prompts are a single text: a string, or the messages of one conversation."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))


def _observation(
    policy: TokenModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], max_new_tokens: int
) -> dict[str, Tensor]:
    """Return contexts in which each response stands behind its prompt, as an environment shows them."""
    if policy.decoder_start_ids:
        decoder = [[*policy.decoder_start_ids, *response] for response in responses]
        width = len(policy.decoder_start_ids) + max_new_tokens
        return {**_padded(prompts, max(map(len, prompts)), ""), **_padded(decoder, width, "decoder_")}
    contexts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    return _padded(contexts, max(map(len, prompts)) + max_new_tokens, "")


def _padded(rows: Sequence[Sequence[int]], width: int, part: str) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    lengths = torch.tensor([len(tokens) for tokens in rows])
    mask = torch.arange(width) < lengths[:, None]  # (B, W)
    return {f"{part}input_ids": ids, f"{part}attention_mask": mask.long()}


def _text(policy: TokenModel, tokenizer: Any, prompt: Sequence[int], response: Sequence[int]) -> str:
    # The response of an encoder-decoder model does not stand behind its prompt.
    return decode_continuation(tokenizer, [] if policy.decoder_start_ids else prompt, response)


def _tokenizer(policy: TokenModel, given: Any) -> Any:
    tokenizer = tokenizer_of(policy.lm) if given is None else load_tokenizer(given)
    if tokenizer is None:
        raise ConfigError(
            "no tokenizer is saved with the policy's weights, so it cannot read texts: pass the one that it was "
            "trained with, generate(text, tokenizer=...)"
        )
    check_tokenizer(tokenizer, policy.lm, policy.vocab_size)
    return tokenizer


def _check_room(policy: TokenModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = position_limit(policy.lm.config)
    longest = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=1) == 0:
        raise ConfigError("a text to continue is empty, and the tokenizer has no BOS: give it a first token")
    taken = max_new_tokens if policy.decoder_start_ids else longest + max_new_tokens
    if limit is not None and taken > limit:
        raise ConfigError(
            f"the longest text has {longest} tokens, and with max_new_tokens={max_new_tokens} more it exceeds the "
            f"{limit} positions of the model: shorten the text, or lower max_new_tokens"
        )
