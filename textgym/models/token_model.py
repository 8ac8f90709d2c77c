"""TokenModel: a language model as a distribution over the next token."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeGuard, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from textgym.data.files import atomic_folder
from textgym.models.adapters import carries_adapters, frozen_copy, is_twin, load_lm, without_peft
from textgym.models.architectures.attention import States
from textgym.models.architectures.encoder_decoder import decoder_start_ids
from textgym.models.architectures.output_head import output_head
from textgym.models.architectures.support import check_supported
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.decoding.contexts import read_contexts
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder
from textgym.models.distributions.log_probs import token_log_probs
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.models.loading import EMBEDDED, freeze, is_trained, load_causal_lm, quiet, shared_causal_lm
from textgym.models.machine.devices import Device
from textgym.models.merging import merged, save_plain
from textgym.models.sequences import Sequences

Observation = Mapping[str, Any]
"""An environment's observation: `input_ids` and `attention_mask`, `(B, W)` or `(W,)`, numpy or torch.

For encoder-decoder models these are the prompt, and there are also `decoder_input_ids` and `decoder_attention_mask`.
"""

POLICY = "textgym policy"
"""Kind of saved models in their manifest."""
RECORDING_HOOK = "output_capturing_hook"
"""Name of the forward hook that transformers registers on layers to record their outputs."""

Model = TypeVar("Model", bound="TokenModel")


class TokenModel(nn.Module):
    """A language model that scores tokens, one at a time from observations or for whole sequences.

    Args:
        lm: A causal or encoder-decoder language model of transformers, or a peft model of one. Its dropout is removed,
            so that log-probs of the same tokens are equal in sampling and in training.
        temperature: Divisor of the logits, in sampling and in scoring.
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
        self._twins: WeakSet[TokenModel] = WeakSet()  # frozen copies that share weights with this model

    def __getstate__(self) -> dict[str, Any]:
        """Remove transformers' recording hooks, which are closures and cannot be pickled.

        transformers installs them again at the next forward pass.
        """
        for module in self.lm.modules():
            recording = [
                key for key, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") == RECORDING_HOOK
            ]
            for key in recording:
                del module._forward_hooks[key]
            if recording or "_output_capturing_hooks_installed" in vars(module):
                module._output_capturing_hooks_installed = False
        return {name: value for name, value in self.__dict__.items() if name != "_twins"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a model, which shares no weights with frozen copies of the original."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._twins = WeakSet()

    @classmethod
    def load(
        cls, model: str | Path | nn.Module | TokenModel, *, temperature: float = 1.0, device: Device = None
    ) -> TokenModel:
        """Return a frozen model.

        Args:
            model: A name, a path, a language model or a `TokenModel`. A `TokenModel` is returned unchanged, and a
                language model whose weights are all frozen (`requires_grad_(False)`) is used without a copy. A language
                model with trainable weights is copied, so that training it does not change the result.
            temperature: Divisor of the logits.
            device: Device of a model that is loaded by name; a model that is given as an object stays on its device.
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
        """Return a frozen copy of the model; with an adapter it shares the base model's weights, which never change."""
        return self.take_along(freeze(TokenModel(frozen_copy(self.lm), self.temperature)))

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
    ) -> None:
        """Write a plain transformers folder, with adapters merged in a copy; a policy's critic is beside it.

        Everything is written under a temporary name first, so a full disk leaves the old folder as it was.

        Args:
            folder: Folder to write; it must be empty or not exist.
            tokenizer: The model's tokenizer, to write too.
            overwrite: Whether to replace a model that was saved there before.

        Raises:
            FileExistsError: If the folder has files.
            OSError: If the disk is full or the folder not writable.
        """
        with atomic_folder(folder, POLICY, type(self).__name__, overwrite=overwrite) as temporary, quiet():
            self._write(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)

    def plain_lm(self) -> Any:
        """Return the language model without adapters: a copy that they are merged into, or the model itself."""
        return merged(self.lm) if carries_adapters(self.lm) else self.lm

    def _write(self, folder: Path) -> None:
        """Write the weights, in the format of transformers."""
        save_plain(self.plain_lm(), folder)

    def take_along(self, copied: Model) -> Model:
        """Convert a copy together with this model from now on, if it shares weights with it; return the copy."""
        if is_twin(copied, self):
            self._twins.add(copied)
        return copied

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the weights, for `.to`, `.cuda`, `.cpu` and `.half`, and free the cache of the old weights.

        Frozen copies follow: weights that they share are converted with these, so their own adapters must be, too.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_cache()
        for copied in self._twins:
            copied._apply(fn, recurse)
        return self

    @property
    def decoder_start_ids(self) -> tuple[int, ...]:
        """The argument `decoder_start_ids` of environments for an encoder-decoder model; `()` for causal models."""
        return decoder_start_ids(self.lm)

    def log_prob(self, observation: Observation, action: Any, action_masks: Any = None) -> Tensor:
        """Return the log-prob `(B,)` or `()` of one action in each state, by cached decoding.

        Args:
            observation: The state before the action.
            action: `(B,)` token ids.
            action_masks: Bool `(B, V)`, the allowed actions; `None` allows all.
        """
        hidden, batched = self._advance(observation)
        action = torch.as_tensor(action, device=self.device).reshape(-1)
        with torch.no_grad(), self._own_precision():
            distribution = self.distribution(action_masks)
            log_prob = distribution.log_probs_of(self.head(hidden), action)  # forbidden actions: without the mask
        return log_prob if batched else log_prob[0]

    @torch.no_grad()
    def sequence_log_probs(self, sequences: Sequences) -> Tensor:
        """Return log-probs `(N, T)` of the generated tokens by one packed pass, zero elsewhere; without gradients."""
        return self.score_sequences(sequences)[0]

    def score_sequences(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return `sequence_log_probs` with gradients, and entropies `(N, T)` without gradients."""
        if torch.is_grad_enabled():
            self.reset_cache()  # an update follows, and fused optimisers do not increase torch's version counters
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
        """Return the log-prob `(M,)` of one action in each state by one packed pass; `action_masks` bool `(M, V)`."""
        return token_log_probs(
            self.hidden(states), self.head, actions, self.vocab_size, self.distribution(action_masks)
        )[0]

    def logits(self, states: States) -> Tensor:
        """Return logits `(M, V)` of the next token in each state, divided by the temperature, float32."""
        return self.head_logits(self.hidden(states))

    def hidden(self, states: States) -> Tensor:
        """Return the last hidden state `(M, d)` of each state by one packed pass."""
        return states.hidden(self.lm)

    def next_logits(self, observation: Observation) -> Tensor:
        """Return logits `(B, V)` of the next token for observations, as `logits` does, by cached decoding."""
        with torch.no_grad(), self._own_precision():
            return self.head_logits(self.next_hidden(observation))

    def next_hidden(self, observation: Observation) -> Tensor:
        """Return the last hidden state `(B, d)` of each context of an observation, by cached decoding."""
        return self._advance(observation)[0]

    def reset_cache(self) -> None:
        """Free the key-value cache."""
        self._decoder = None

    @property
    def cache_bytes(self) -> int:
        """Current size of the key-value cache in bytes."""
        return 0 if self._decoder is None else self._decoder.nbytes

    def distribution(self, action_masks: Any = None) -> TokenDistribution:
        """Return the distribution of tokens for a mask of allowed tokens, bool `(m, V)`; `None` allows all."""
        if action_masks is not None:
            action_masks = torch.as_tensor(action_masks, device=self.device).bool().reshape(-1, self.vocab_size)
        return TokenDistribution(self.temperature, action_masks)

    def distribution_of(self, sequences: Sequences) -> TokenDistribution:
        """Return the distribution of the M generated tokens of sequences, with their stop rule."""
        return TokenDistribution(self.temperature, banned=sequences.banned, stop_ids=sequences.stop.ids)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return logits `(B, V)`, divided by the temperature, in float32, for last hidden states `(B, d)`."""
        return self.distribution().logits(self.head(hidden))

    def _advance(self, observation: Observation) -> tuple[Tensor, bool]:
        """Return last hidden states `(B, d)` of an observation, and whether the observation is a batch."""
        contexts, batched = read_contexts(observation, self.device)
        if not fits(self._decoder, contexts.shape, self.device):
            self._decoder = contexts.decoder(self.lm)
        with self._own_precision():
            return self._decoder.advance(*contexts.known), batched

    def _own_precision(self) -> torch.autocast:
        """Disable autocast for cached decoding, because it would mix dtypes in the cache.

        Whole sequences do use the caller's autocast, for updates in bfloat16.
        """
        return torch.autocast(self.device.type, enabled=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenModel:
        """Copy without the cache, because Gymnasium copies the arguments of an environment into its `spec`."""
        decoder, self._decoder = self._decoder, None
        try:
            new = self.__class__.__new__(self.__class__)
            memo[id(self)] = new
            new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_twins"})
            new._twins = WeakSet()  # those share weights with this model, not with the copy
        finally:
            self._decoder = decoder
        return new


def fits(
    decoder: CachedDecoder | CachedEncoderDecoder | None, shape: tuple[int, ...], device: torch.device
) -> TypeGuard[CachedDecoder | CachedEncoderDecoder]:
    """Return whether a decoder has this shape and is on the device of the model, which may have been moved."""
    return decoder is not None and decoder.shape == shape and decoder.slots.device == device
