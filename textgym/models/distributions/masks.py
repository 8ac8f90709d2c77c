"""Action masks: the tokens that are allowed next, as a function of the context.

A mask from a language model makes a large action space small: it allows only the few likely tokens out of tens of
thousands (NLPO: Ramamurthy et al., 2022, section 3.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textgym.models.decoding.sampling import running_sum
from textgym.models.machine.devices import Device
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation, TokenModel

CONTEXTS = 256
"""Number of contexts in one call of the function of a `FunctionMask`."""


class ActionMask(ABC):
    """Base class of masks: the allowed tokens for a batch of contexts, or for all states of whole sequences.

    Environment, buffer and callbacks hold the same mask object, so that a refresh applies to all of them. For this
    reason `copy.deepcopy` returns the object itself.
    """

    @abstractmethod
    def __call__(self, observation: Observation) -> Tensor:
        """Return bool `(B, V)`: the allowed tokens after each context of an observation."""

    @abstractmethod
    def of_sequences(self, sequences: Sequences) -> Tensor:
        """Return bool `(M, V)`: the allowed tokens in the states before each response token, row by row."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ActionMask:
        return self


class FunctionMask(ActionMask):
    """A mask that a function of the context computes.

    Args:
        function: Takes an observation, that is, a dict with `input_ids` and `attention_mask` `(B, W)`, and also
            `decoder_input_ids` and `decoder_attention_mask` for encoder-decoder models; returns bool `(B, V)`. Ignore
            ids where the attention mask is 0.
    """

    def __init__(self, function: Callable[[Observation], Any]) -> None:
        self.function = function

    def __call__(self, observation: Observation) -> Tensor:
        """Return the function's value."""
        return torch.as_tensor(self.function(observation), dtype=torch.bool)

    def of_sequences(self, sequences: Sequences) -> Tensor:
        """Return the function's values for every context of the sequences."""
        rows, steps = sequences.steps
        chunks = zip(rows.split(CONTEXTS), steps.split(CONTEXTS), strict=True)
        return torch.cat([self(sequences[row].observation(step)) for row, step in chunks])


class ModelMask(ActionMask):
    """Base class of masks that depend on a language model's next-token distribution.

    Args:
        model: Name, path, language model or `TokenModel`; it is frozen.
        device: Device of a model that is given by name; `None` for the device of the environment.
    """

    def __init__(self, model: str | nn.Module | TokenModel, device: Device = None) -> None:
        self.model = TokenModel.load(model, device=device)
        self.name = model if isinstance(model, str) and device is None else None

    @abstractmethod
    def choose(self, logits: Tensor) -> Tensor:
        """Return the allowed tokens, bool `(m, V)`, for logits `(m, V)`."""

    def refresh(self, model: TokenModel) -> None:
        """Replace the model by another one, which the caller has frozen: `mask.refresh(policy.frozen_copy())`."""
        self.model, self.name = model, None

    def follow_device(self, device: torch.device) -> None:
        """Move the model to the device of the environment, unless the caller chose a device."""
        if self.name is not None and self.model.device != device:
            self.model = TokenModel.load(self.name, device=device)  # loaded again: other objects may share the old one

    @torch.no_grad()
    def __call__(self, observation: Observation) -> Tensor:
        """Return the allowed tokens, by cached decoding."""
        return self.choose(self.model.next_logits(observation))

    @torch.no_grad()
    def of_sequences(self, sequences: Sequences) -> Tensor:
        """Return the allowed tokens, by one packed forward pass."""
        return self.choose(self.model.logits(sequences.to(self.model.device).states()))


class TopPMask(ModelMask):
    """The smallest set of tokens whose total probability is at least `p` (the nucleus; Holtzman et al., 2020).

    The set has at least `min_tokens` tokens.

    >>> mask = TopPMask("tiny", p=0.5)
    >>> mask.choose(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()).tolist()
    [[True, True, False, False]]
    """

    def __init__(
        self, model: str | nn.Module | TokenModel, p: float = 0.9, min_tokens: int = 1, device: Device = None
    ) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"p is a share of probability, above 0 and at most 1; got {p}")
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
        super().__init__(model, device)
        self.p, self.min_tokens = p, min_tokens

    def choose(self, logits: Tensor) -> Tensor:
        """Return the tokens whose more likely tokens have a total probability below `p`."""
        probabilities, order = logits.softmax(-1).sort(-1, descending=True)
        before = running_sum(probabilities) - probabilities
        allowed = (before < self.p) | (self.p == 1)  # rounded sums may reach 1 before the last tokens
        allowed[..., : self.min_tokens] = True
        return torch.zeros_like(allowed).scatter_(-1, order, allowed)


class TopKMask(ModelMask):
    """The `k` most likely tokens of the model.

    >>> mask = TopKMask("tiny", k=1)
    >>> mask.choose(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()).tolist()
    [[True, False, False, False]]
    """

    def __init__(self, model: str | nn.Module | TokenModel, k: int = 50, device: Device = None) -> None:
        super().__init__(model, device)
        if not 1 <= k <= self.model.vocab_size:
            raise ValueError(f"k must be from 1 to the {self.model.vocab_size} tokens of the vocabulary, got {k}")
        self.k = k

    def choose(self, logits: Tensor) -> Tensor:
        """Return the tokens with the `k` largest logits."""
        chosen = logits.topk(self.k, dim=-1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)


def as_action_mask(given: ActionMask | Callable[[Observation], Any] | None, device: torch.device) -> ActionMask | None:
    """Return the mask that restricts actions; its model, if it has one, moves to the environment's device."""
    mask = given if given is None or isinstance(given, ActionMask) else FunctionMask(given)
    if isinstance(mask, ModelMask):
        mask.follow_device(device)
    return mask


def narrow(allowed: Tensor, mask: Tensor) -> Tensor:
    """Return the intersection of two masks `(B, V)`; `allowed` in rows where the intersection is empty."""
    both = allowed & mask.to(allowed.device)
    return torch.where(both.any(-1, keepdim=True), both, allowed)
