"""The interface of text environments for wrappers, agents and users' own code.

Code outside of this folder uses these names and not an environment's `task`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from textgym.data.rows import Row
from textgym.envs.spaces import KLPayer
from textgym.envs.text_task import TextTask
from textgym.errors import ConfigError
from textgym.models.distributions.log_probs import StopRule
from textgym.models.distributions.masks import ActionMask
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation, TokenModel
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import Scorer
from textgym.rewards.kl import KLPenalty


class TextProperties:
    """Properties of `TextEnv` and `TextVectorEnv`, read as `env.unwrapped.tokenizer` through any wrappers."""

    task: TextTask
    held_out: int = 0
    """How many prompts were to be kept from training, as agents are loaded with the same ones; 0 if none were."""

    @property
    def device(self) -> torch.device:
        """The device of the episodes."""
        return self.task.device

    @property
    def num_rows(self) -> int:
        """B, the number of rows; a `TextEnv` is a batch of one."""
        return self.task.episodes.num_rows

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of prompts and completions."""
        return self.task.tokenizer

    @property
    def vocab_size(self) -> int:
        """V, the number of actions."""
        return self.task.vocab_size

    @property
    def pad_token_id(self) -> int:
        """The token in empty slots."""
        return self.task.episodes.pad_token_id

    @property
    def prompts(self) -> list[Row]:
        """The prompts, each with its columns."""
        return self.task.rows

    @property
    def prompt_tokens(self) -> np.ndarray | None:
        """Number of tokens of each prompt before it is cut, `(P,)`; `None` in games, which make theirs later."""
        return None if self.task.answers else self.task.prompt_tokens

    @property
    def num_cut_prompts(self) -> int:
        """How many prompts have lost tokens at their beginning."""
        return int((self.task.prompt_tokens > self.task.width).sum())

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.max_tokens - self.max_new_tokens

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens of a response."""
        return self.task.episodes.max_new_tokens

    @property
    def max_tokens(self) -> int:
        """W, the maximum number of tokens of prompt and response together."""
        return self.task.episodes.width

    @property
    def stop(self) -> StopRule:
        """Stop tokens and the minimum length of a response."""
        return self.task.episodes.stop

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """For encoder-decoder models, the token ids of the decoder before the response."""
        return self.task.episodes.decoder_start

    @property
    def action_mask(self) -> ActionMask | None:
        """Restriction of the actions, besides `min_new_tokens`."""
        return self.task.action_mask

    @property
    def restricts_actions(self) -> bool:
        """Whether any action is ever masked out."""
        return self.task.restricts_actions

    @property
    def kl_payer(self) -> KLPayer:
        """What applies the KL penalty: `"environment"`, `"agent"`, or `"nobody"` if there is no penalty."""
        return self.task.action_space.kl_payer

    @property
    def scorer(self) -> Scorer:
        """The scorer, which calls the reward functions."""
        return self.task.scorer

    @property
    def reference(self) -> TokenModel | None:
        """The reference that the environment was made with."""
        return self.task.penalty.reference if self.task.penalty is not None else None

    @property
    def truncates(self) -> bool:
        """Whether the length limit is reported as truncation."""
        return self.task.truncates

    @property
    def missing_eos_penalty(self) -> float:
        """Number that is subtracted from the score of a row that ended at the length limit."""
        return self.task.missing_eos_penalty

    def replace_prompts(self, prompts: list[Row]) -> None:
        """Use other prompts in all episodes that begin after this call."""
        self.task.take_prompts(prompts)

    def current_observation(self) -> Observation:
        """Return the current observation of all rows, `(B, W)` tensors on the device."""
        return self.task.episodes.observation()

    def allowed_tokens(self) -> Tensor:
        """Return which tokens are currently allowed, bool `(B, V)` on the device."""
        return self.task.action_masks()


class RolloutEnv(Protocol):
    """Attributes and methods that agents need from an environment, besides those of Gymnasium's `VectorEnv`.

    `TextVectorEnv` has them. Your own environment works with all agents of `textgym.agents` if it has them too.

    Attributes:
        num_envs: B, the number of rows.
        waiting: Bool `(B,)`: the rows that have ended and were not reset yet; `None` before the first reset.
        device: The device of the episodes.
        tokenizer: The tokenizer of prompts and completions.
        prompts: The prompts, each with its columns.
        max_new_tokens: Maximum number of tokens of a response.
        stop: Stop tokens and the minimum length of a response.
        decoder_start: For encoder-decoder models, the token ids of the decoder before the response.
        action_mask: Restriction of the actions besides `stop`; `None` if there is none.
        restricts_actions: Whether any action is ever masked out.
        scorer: The scorer, which calls the reward functions.
        reference: The reference model that the environment was made with, if any.
        missing_eos_penalty: Number that is subtracted from the score of a row that ended at the length limit.
        takes_whole_responses: Whether `submit` is possible: a response consists only of the policy's tokens.
        transcript: Prompt, completion and columns of each row's last episode.
    """

    num_envs: int
    waiting: np.ndarray | None

    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def tokenizer(self) -> Any: ...  # noqa: D102
    @property
    def prompts(self) -> list[Row]: ...  # noqa: D102
    @property
    def max_new_tokens(self) -> int: ...  # noqa: D102
    @property
    def stop(self) -> StopRule: ...  # noqa: D102
    @property
    def decoder_start(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def action_mask(self) -> ActionMask | None: ...  # noqa: D102
    @property
    def restricts_actions(self) -> bool: ...  # noqa: D102
    @property
    def scorer(self) -> Scorer: ...  # noqa: D102
    @property
    def reference(self) -> TokenModel | None: ...  # noqa: D102
    @property
    def missing_eos_penalty(self) -> float: ...  # noqa: D102
    @property
    def takes_whole_responses(self) -> bool: ...  # noqa: D102
    @property
    def transcript(self) -> list[dict[str, Any]]: ...  # noqa: D102

    def fit(self, policy: TokenModel) -> None:
        """Compare a policy with tokenizer, reference and lengths; see `TextVectorEnv.fit`."""

    def agent_penalty(self, start: Callable[[], TokenModel], agent: str) -> KLPenalty:
        """Return the KL penalty that an agent applies, to the environment's reference or else to the initial policy.

        Args:
            start: Function that makes the reference if the environment has none.
            agent: The agent's name, for the error message.

        Raises:
            ValueError: If the environment also applies the penalty.
        """

    def whole_episodes(self, wrapped: bool = False) -> AbstractContextManager[None]:
        """Return a context in which ended rows wait, arrays are tensors, and the agent applies the KL penalty.

        With wrappers arrays are NumPy arrays, because many wrappers do not support tensors. Afterwards the environment
        has its old settings; reset it after a rollout.
        """

    def next_prompts(self, number: int) -> np.ndarray:
        """Return the indices `(number,)` of the next prompts, without replacement until all have been used."""

    def allowed_tokens(self) -> Tensor:
        """Return which tokens are currently allowed, bool `(B, V)` on the device."""

    def submit(self, tokens: Tensor, lengths: Tensor) -> tuple[Any, dict[str, Any]]:
        """End the episodes of all rows with whole responses; see `TextVectorEnv.submit`."""

    def sequences(self) -> Sequences:
        """Return all rows as they are now, prompts and responses."""

    def token_rewards(self) -> list[np.ndarray]:
        """Return the rewards of each row's response tokens, of episodes that have ended."""

    def finished(self, rows: np.ndarray) -> Finished:
        """Return the arguments of reward functions for rows (indices) that have ended."""

    def progress(self) -> dict[str, Any]:
        """Return the queue of prompts and the random generator, as plain values for a checkpoint."""

    def resume(self, progress: dict[str, Any]) -> None:
        """Restore the state that `progress` returned."""


def rollout_env(envs: Any) -> RolloutEnv:
    """Return the unwrapped environment, which agents use.

    Raises:
        ConfigError: If `envs` is not a batch of texts.
    """
    base = getattr(envs, "unwrapped", None)
    if isinstance(base, VectorEnv) and hasattr(base, "whole_episodes"):
        return cast(RolloutEnv, base)
    raise ConfigError(
        f"agents need a batch of texts, and {type(envs).__name__} is not one: make one with "
        "gym.make_vec('textgym/Text-v0', num_envs=16, ...), or see textgym.envs.interface.RolloutEnv for what an "
        "environment of your own must have"
    )
