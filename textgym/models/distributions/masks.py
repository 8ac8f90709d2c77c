"""Action masks: which tokens may come next, as a function of the context.

A mask by a language model is the remedy for large action spaces: of tens of thousands of tokens it leaves the few that
make sense (NLPO: Ramamurthy et al., 2022, section 3.2).
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
"""Contexts that a plain function of the context is asked about at once."""


class ActionMask(ABC):
    """Answers with the allowed tokens, for contexts one by one and for whole sequences alike.

    Environment, buffer and callbacks hold the same mask, so that a refresh reaches all of them; copying returns it.
    """

    @abstractmethod
    def __call__(self, observation: Observation) -> Tensor:
        """Bool `(B, V)`: the tokens allowed after each observed context."""

    @abstractmethod
    def of_sequences(self, sequences: Sequences) -> Tensor:
        """Bool `(M, V)`: the same for the states before each response token, row by row."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ActionMask:
        return self


class FunctionMask(ActionMask):
    """A mask by any function of the context.

    Args:
        function: takes an observation, `input_ids` and `attention_mask` `(B, W)`, and those of the decoder where there
            is one; returns bool `(B, V)`. What the ids hold beyond the masks means nothing.
    """

    def __init__(self, function: Callable[[Observation], Any]) -> None:
        self.function = function

    def __call__(self, observation: Observation) -> Tensor:
        """Asks the function."""
        return torch.as_tensor(self.function(observation), dtype=torch.bool)

    def of_sequences(self, sequences: Sequences) -> Tensor:
        """Asks the function about every context that the sequences went through."""
        rows, steps = sequences.steps
        chunks = zip(rows.split(CONTEXTS), steps.split(CONTEXTS), strict=True)
        return torch.cat([self(sequences[row].observation(step)) for row, step in chunks])


class ModelMask(ActionMask):
    """A mask by a language model's own opinion of the next token.

    Args:
        model: a name, a path, a language model or a `TokenModel`; frozen.
        device: where a model that is given by name is; `None`: where the environment is.
    """

    def __init__(self, model: str | nn.Module | TokenModel, device: Device = None) -> None:
        self.model = TokenModel.load(model, device=device)
        self.name = model if isinstance(model, str) and device is None else None

    @abstractmethod
    def choose(self, logits: Tensor) -> Tensor:
        """Bool `(m, V)`, from logits `(m, V)`."""

    def refresh(self, model: TokenModel) -> None:
        """Goes by `model` from now on, frozen by the caller: `mask.refresh(policy.frozen_copy())`."""
        self.model, self.name = model, None

    def follow_device(self, device: torch.device) -> None:
        """Hears from an environment where it is, and goes there unless the caller has chosen a device."""
        if self.name is not None and self.model.device != device:
            self.model = TokenModel.load(self.name, device=device)  # moved in place, others' would move with it

    @torch.no_grad()
    def __call__(self, observation: Observation) -> Tensor:
        """By cached decoding."""
        return self.choose(self.model.next_logits(observation))

    @torch.no_grad()
    def of_sequences(self, sequences: Sequences) -> Tensor:
        """In one packed pass."""
        return self.choose(self.model.logits(sequences.to(self.model.device).states()))


class TopPMask(ModelMask):
    """The fewest tokens that hold at least the share `p` of the model's probability (its nucleus).

    At least `min_tokens` of them.

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
        """The tokens before which less than `p` has been gathered, most likely first."""
        probabilities, order = logits.softmax(-1).sort(-1, descending=True)
        before = running_sum(probabilities) - probabilities
        kept = (before < self.p) | (self.p == 1)  # sums reach 1 before the last tokens, by rounding
        kept[..., : self.min_tokens] = True
        return torch.zeros_like(kept).scatter_(-1, order, kept)


class TopKMask(ModelMask):
    """The `k` tokens that the model finds most likely.

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
        """The k largest."""
        chosen = logits.topk(self.k, dim=-1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)


def narrow(allowed: Tensor, mask: Tensor) -> Tensor:
    """Both at once, bool `(B, V)`; where nothing would be left, `allowed` alone."""
    both = allowed & mask.to(allowed.device)
    return torch.where(both.any(-1, keepdim=True), both, allowed)
