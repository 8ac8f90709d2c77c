"""TokenSpace: the action space of a text environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from textgym.models.distributions import log_probs
from textgym.models.distributions.log_probs import StopRule
from textgym.models.distributions.masks import ActionMask

KLPayer = Literal["environment", "agent", "nobody"]

# Stable-Baselines3 pickles action spaces when it saves. Version 0.1 had `StopRule` in this module.
sys.modules.setdefault("textgym.models.log_probs", log_probs)


def as_action(action: Any, device: torch.device) -> Tensor:
    """Return one action as int64 `(1,)`.

    Raises:
        ValueError: If it is not one whole number, such as 1.5, `"5"` or `True`.
    """
    number = _whole_numbers(action, device)
    if number.numel() != 1:
        raise ValueError(f"an action is one whole number, got {action!r}")
    return number.reshape(1)


def as_actions(actions: Any, num_rows: int, device: torch.device) -> Tensor:
    """Return one action for each row as int64 `(num_rows,)`; it does not check that they are in the vocabulary.

    Raises:
        ValueError: If they are not whole numbers, or not one for each row.
    """
    numbers = _whole_numbers(actions, device)
    if numbers.shape != (num_rows,):
        raise ValueError(f"expected one action for each of the {num_rows} rows, got shape {tuple(numbers.shape)}")
    return numbers


def _whole_numbers(actions: Any, device: torch.device) -> Tensor:
    try:
        tensor = torch.as_tensor(actions, device=device)
    except (TypeError, ValueError, RuntimeError):  # strings, None, objects
        tensor = None
    if tensor is None or tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"actions must be whole numbers, got {actions!r}")
    return tensor.long()


class TokenSpace(gym.spaces.Discrete):
    """The action space `Discrete(V)` of token ids, with the environment's properties that SB3 agents need.

    Libraries such as Stable-Baselines3 make policies and buffers from the two spaces only, so properties such as the
    stop tokens are attributes of the action space. Spaces are equal if they are equal as `Discrete`. Pickles and copies
    keep only V, `stop`, `kl_payer` and `decoder_start`.

    Args:
        n: Number of tokens, V.
        stop: Stop tokens and the minimum length of a response.
        kl_payer: What applies the KL penalty: `"environment"`, `"agent"` (`kl_mode="deferred"`), or `"nobody"` if there
            is no penalty.
        action_mask: Further restriction of the actions.
        decoder_start: For encoder-decoder models, the token ids of the decoder before the response.
        tokenizer: The tokenizer.

    Attributes:
        agent_pays: Whether a buffer or callback of the agent has declared, by `pay_kl`, that it applies the KL penalty.
        temperature: Temperature of the policy.
        observation: Current observation of all rows, if the environment updates it.
        explorer: Function that samples the tokens of `sample`; without it, or if it returns `None`, they are uniform.
    """

    def __init__(
        self,
        n: int,
        stop: StopRule | None = None,
        kl_payer: KLPayer = "nobody",
        action_mask: ActionMask | None = None,
        decoder_start: tuple[int, ...] = (),
        tokenizer: Any = None,
    ) -> None:
        super().__init__(n)
        self.stop = stop if stop is not None else StopRule()
        self.kl_payer = kl_payer
        self.decoder_start = decoder_start
        self._detach(action_mask, tokenizer)

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        """Sample a token: from `explorer` if it is set and no mask or probabilities are given, else as `Discrete`."""
        if self.explorer is not None and mask is None and probability is None:
            token = self.explorer()
            if token is not None:
                return np.int64(token)
        return super().sample(mask, probability)

    def pay_kl(self, payer: str) -> None:
        """Declare that a buffer or callback of the agent applies the KL penalty.

        Args:
            payer: Name of its class, for the error message.

        Raises:
            ValueError: If the environment applies it already.
        """
        if self.kl_payer == "environment":
            raise ValueError(
                f"the KL penalty would be applied twice, by the environment and by {payer}: make the environment with "
                f"kl_mode='deferred', or disable it in {payer} with kl_coef=0"
            )
        self.agent_pays = True

    def check_kl_is_paid(self) -> None:
        """Check that the KL penalty is applied; called before an agent learns.

        Raises:
            ValueError: If the environment leaves the penalty to the agent, and the agent does not apply it.
        """
        if self.kl_payer == "agent" and not self.agent_pays:
            raise ValueError(
                "nothing applies the KL penalty: the environment leaves it to the agent (kl_mode='deferred'). Use "
                "EpisodeRolloutBuffer with rollout_buffer_kwargs={'reference': ..., 'kl_coef': ...}, or "
                "KLCallback(reference, kl_coef), or make the environment with kl_mode='reference' or with kl_coef=0"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("agent_pays", "temperature", "observation", "explorer", "action_mask", "tokenizer"):
            del state[name]
        return state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._detach(None, None)

    def _detach(self, action_mask: ActionMask | None, tokenizer: Any) -> None:
        self.agent_pays = False
        self.temperature = 1.0
        self.observation: dict[str, np.ndarray] | None = None
        self.explorer: Callable[[], int | None] | None = None
        self.action_mask = action_mask
        self.tokenizer = tokenizer
