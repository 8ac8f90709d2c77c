"""TokenModel: a language model as a distribution over the next token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from textgym.models.adapters import frozen_copy, load_lm, without_peft
from textgym.models.architectures.attention import States
from textgym.models.architectures.encoder_decoder import decoder_start_ids
from textgym.models.architectures.output_head import output_head
from textgym.models.architectures.support import check_supported
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.decoding.contexts import read_contexts
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder
from textgym.models.distributions.log_probs import token_log_probs
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.models.loading import EMBEDDED, freeze, is_trained, load_causal_lm, shared_causal_lm
from textgym.models.machine.devices import Device
from textgym.models.sequences import Sequences

Observation = Mapping[str, Any]
"""`input_ids` and `attention_mask`, `(B, W)` or `(W,)`, numpy or torch, as the environments give them.

For encoder-decoder models these are the prompt, and `decoder_input_ids` and `decoder_attention_mask` are beside them.
"""


RECORDING_HOOK = "output_capturing_hook"
"""Name of the function that transformers hooks into the layers of a model."""


class TokenModel(nn.Module):
    """Scores tokens with a language model: one at a time from observations, or whole sequences.

    Args:
        lm: a causal language model of transformers, or an encoder-decoder one; or a peft model around one. Its dropout
            is removed.
        temperature: divides the logits everywhere.
    """

    def __init__(self, lm: Any, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature}; for greedy actions use deterministic=True"
            )
        lm = without_peft(lm)
        head = output_head(lm)
        check_supported(lm, head)
        self.lm = lm
        self.temperature = temperature
        self.head = head
        self.vocab_size = self.head.weight.shape[0]
        self._decoder: CachedDecoder | CachedEncoderDecoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickles after use too: transformers' recording hooks are closures; it puts them back at the next call."""
        for module in self.lm.modules():
            recording = [
                key for key, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") == RECORDING_HOOK
            ]
            for key in recording:
                del module._forward_hooks[key]
            if recording or "_output_capturing_hooks_installed" in vars(module):
                module._output_capturing_hooks_installed = False
        return self.__dict__

    @classmethod
    def load(
        cls, model: str | nn.Module | TokenModel, *, temperature: float = 1.0, device: Device = None
    ) -> TokenModel:
        """A frozen scorer, from a name, a path, a language model or another `TokenModel`, which is returned as it is.

        A model that is given stays where it is; `device` is for one that is loaded by its name. Of a language model
        with weights that are trained a copy is taken; one that is frozen, by `requires_grad_(False)`, is used as it is.
        """
        if isinstance(model, TokenModel):
            return model
        if isinstance(model, nn.Module):
            lm = without_peft(model)
            return freeze(cls(frozen_copy(lm) if is_trained(lm) else load_causal_lm(lm), temperature))
        if isinstance(model, str) and model in EMBEDDED:
            return freeze(cls(shared_causal_lm(model, device=device), temperature))
        return freeze(cls(load_lm(model, device=device), temperature))

    def frozen_copy(self) -> TokenModel:
        """What the model is now, frozen. Under an adapter it shares the weights that are frozen anyway."""
        return freeze(TokenModel(frozen_copy(self.lm), self.temperature))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.cuda`, `.cpu` and `.half` do to the weights; a cache that was made by the old ones is freed."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_cache()
        return self

    @property
    def decoder_start_ids(self) -> tuple[int, ...]:
        """The `decoder_start_ids` that the environment of an encoder-decoder model is made with; `()` for others."""
        return decoder_start_ids(self.lm)

    def log_prob(self, observation: Observation, action: Any, action_masks: Any = None) -> Tensor:
        """Log-prob `(B,)` or `()` of one action in each state, by cached decoding.

        Args:
            observation: the state before the action.
            action: `(B,)` token ids.
            action_masks: bool `(B, V)`, the allowed actions; `None` allows all.
        """
        hidden, batched = self._advance(observation)
        action = torch.as_tensor(action, device=self.device).reshape(-1)
        with torch.no_grad(), self._own_precision():
            distribution = self.distribution(action_masks)
            log_prob = distribution.log_probs_of(self.head(hidden), action)  # an illegal one is scored without the mask
        return log_prob if batched else log_prob[0]

    @torch.no_grad()
    def sequence_log_probs(self, sequences: Sequences) -> Tensor:
        """Log-probs `(N, T)` of the response tokens in one packed pass, zero in the padding."""
        return self.score_sequences(sequences)[0]

    def score_sequences(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """`sequence_log_probs` with gradients, and entropies `(N, T)` without: for losses that need no values."""
        if torch.is_grad_enabled():
            self.reset_cache()  # an update follows; some fused optimisers change weights without a trace
        log_probs, entropies = token_log_probs(
            self.hidden(sequences.states()),
            self.head,
            sequences.actions,
            self.vocab_size,
            self.distribution_of(sequences),
        )
        return sequences.pad(log_probs), sequences.pad(entropies)

    @torch.no_grad()
    def state_log_probs(self, states: States, actions: Tensor, action_masks: Tensor | None = None) -> Tensor:
        """Log-probs `(M,)` of one action in each state, in one packed pass; `action_masks` bool `(M, V)`."""
        return token_log_probs(
            self.hidden(states), self.head, actions, self.vocab_size, self.distribution(action_masks)
        )[0]

    def logits(self, states: States) -> Tensor:
        """Logits `(M, V)` of the next token in each state, divided by the temperature, float32."""
        return self.head_logits(self.hidden(states))

    def hidden(self, states: States) -> Tensor:
        """Last hidden state `(M, d)` of each state, in one packed pass."""
        return states.hidden(self.lm)

    def next_logits(self, observation: Observation) -> Tensor:
        """Logits `(B, V)` of the next token, by cached decoding: `logits` without gradients, from observations."""
        with torch.no_grad(), self._own_precision():
            return self.head_logits(self.next_hidden(observation))

    def next_hidden(self, observation: Observation) -> Tensor:
        """Last hidden state `(B, d)` of each observed context, by cached decoding."""
        return self._advance(observation)[0]

    def reset_cache(self) -> None:
        """Frees the key-value cache."""
        self._decoder = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value cache, as it is now."""
        return 0 if self._decoder is None else self._decoder.nbytes

    def distribution(self, action_masks: Any = None) -> TokenDistribution:
        """Return how logits become a distribution; `action_masks` bool `(m, V)`, the allowed tokens, `None` for all."""
        if action_masks is not None:
            action_masks = torch.as_tensor(action_masks, device=self.device).bool().reshape(-1, self.vocab_size)
        return TokenDistribution(self.temperature, action_masks)

    def distribution_of(self, sequences: Sequences) -> TokenDistribution:
        """Return the same for the M response tokens of these sequences, by their stop rule."""
        return TokenDistribution(self.temperature, banned=sequences.banned, stop_ids=sequences.stop.ids)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits `(B, V)` of the next token from last hidden states `(B, d)`, divided by the temperature, float32."""
        return self.distribution().logits(self.head(hidden))

    def _advance(self, observation: Observation) -> tuple[Tensor, bool]:
        """Hidden states `(B, d)` of the contexts, and whether they came as a batch."""
        contexts, batched = read_contexts(observation, self.device)
        if not fits(self._decoder, contexts.shape, self.device):
            self._decoder = contexts.decoder(self.lm)
        with self._own_precision():
            return self._decoder.advance(*contexts.known), batched

    def _own_precision(self) -> torch.autocast:
        """Decoding keeps the precision of the weights under a caller's autocast, which would mix dtypes in the cache.

        Whole sequences are scored under it, as updates in bfloat16 are.
        """
        return torch.autocast(self.device.type, enabled=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenModel:
        """A copy without the cache: `spec` of a Gymnasium environment copies its arguments."""
        decoder, self._decoder = self._decoder, None
        try:
            new = self.__class__.__new__(self.__class__)
            memo[id(self)] = new
            new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        finally:
            self._decoder = decoder
        return new


def fits(
    decoder: CachedDecoder | CachedEncoderDecoder | None, shape: tuple[int, ...], device: torch.device
) -> TypeGuard[CachedDecoder | CachedEncoderDecoder]:
    """Whether a decoder is for contexts of this shape, and is where the model is, which may have been moved."""
    return decoder is not None and decoder.shape == shape and decoder.slots.device == device
