"""What a text environment tells of itself: to wrappers, to agents and to users' own code.

Nobody outside this folder reads an environment's `task`; these names are what others rely on.
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

    @property
    def device(self) -> torch.device:
        """Where episodes are."""
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
        """The token in the slots behind a text."""
        return self.task.episodes.pad_token_id

    @property
    def prompts(self) -> list[Row]:
        """The prompts, each with its columns."""
        return self.task.rows

    @property
    def max_prompt_tokens(self) -> int:
        """The most tokens of a prompt."""
        return self.max_tokens - self.max_new_tokens

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of a response."""
        return self.task.episodes.max_new_tokens

    @property
    def max_tokens(self) -> int:
        """W, the most tokens of prompt and response together."""
        return self.task.episodes.width

    @property
    def stop(self) -> StopRule:
        """Which tokens end a response, and from when on they may."""
        return self.task.episodes.stop

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """For encoder-decoder models, the token ids that the decoder begins with."""
        return self.task.episodes.decoder_start

    @property
    def action_mask(self) -> ActionMask | None:
        """What narrows the actions, besides `min_new_tokens`."""
        return self.task.action_mask

    @property
    def restricts_actions(self) -> bool:
        """Whether any action is ever masked out."""
        return self.task.restricts_actions

    @property
    def kl_payer(self) -> KLPayer:
        """Who charges the KL penalty: `"environment"`, `"agent"` or `"nobody"`."""
        return self.task.action_space.kl_payer

    @property
    def scorer(self) -> Scorer:
        """What calls the reward functions."""
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
        """What is subtracted from the score of a row that ended at the length limit."""
        return self.task.missing_eos_penalty

    def replace_prompts(self, prompts: list[Row]) -> None:
        """Let episodes that begin from now on begin with other prompts."""
        self.task.take_prompts(prompts)

    def current_observation(self) -> Observation:
        """Return what all rows show now, `(B, W)` tensors on the device."""
        return self.task.episodes.observation()

    def allowed_tokens(self) -> Tensor:
        """Return which tokens are allowed now, bool `(B, V)` on the device."""
        return self.task.action_masks()


class RolloutEnv(Protocol):
    """What an agent asks of a batch of texts, besides `reset` and `step` of Gymnasium's `VectorEnv`.

    `TextVectorEnv` has it. An environment of your own that has it too works with every agent of `textgym.agents`.

    Attributes:
        num_envs: B, the number of rows.
        waiting: Bool `(B,)`: the rows that ended and were not reset yet; `None` before the first reset.
        device: Where the episodes are.
        tokenizer: The tokenizer of prompts and completions.
        prompts: The prompts, each with its columns.
        max_new_tokens: The most tokens of a response.
        stop: Which tokens end a response, and from when on they may.
        decoder_start: For encoder-decoder models, the token ids that the decoder begins with.
        action_mask: What narrows the actions besides `stop`; `None` if nothing does.
        restricts_actions: Whether any action is ever masked out.
        scorer: What calls the reward functions.
        reference: The reference model that the environment was made with, if any.
        takes_whole_responses: Whether `submit` is possible: a response is the policy's tokens and nothing else.
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
    def takes_whole_responses(self) -> bool: ...  # noqa: D102
    @property
    def transcript(self) -> list[dict[str, Any]]: ...  # noqa: D102

    def fit(self, policy: TokenModel) -> None:
        """Compare a policy with tokenizer, reference and lengths; see `TextVectorEnv.fit`."""

    def agent_penalty(self, start: Callable[[], TokenModel], agent: str) -> KLPenalty:
        """Return the KL penalty that an agent charges: against the environment's reference, or the policy's start.

        Args:
            start: Makes the reference where the environment names none.
            agent: The agent's name, for the error.

        Raises:
            ValueError: The environment was told to charge the penalty itself, so it would be charged twice.
        """

    def whole_episodes(self, wrapped: bool = False) -> AbstractContextManager[None]:
        """Return a context in which rows that ended wait, arrays are tensors and the agent charges the KL.

        For wrappers, many of which know NumPy alone, arrays are NumPy's. Afterwards the environment is as its owner
        made it; if a rollout was played, it has to be reset.
        """

    def next_prompts(self, number: int) -> np.ndarray:
        """Return the indices `(number,)` of the next prompts, without replacement until all have been used."""

    def allowed_tokens(self) -> Tensor:
        """Return which tokens are allowed now, bool `(B, V)` on the device."""

    def submit(self, tokens: Tensor, lengths: Tensor) -> tuple[Any, dict[str, Any]]:
        """End the episodes of all rows with whole responses; see `TextVectorEnv.submit`."""

    def sequences(self) -> Sequences:
        """Return all rows as they are now, prompts and responses."""

    def token_rewards(self) -> list[np.ndarray]:
        """Return the rewards of each row's response tokens, of episodes that have ended."""

    def finished(self, rows: np.ndarray) -> Finished:
        """Return what reward functions are given of rows (indices) that have ended."""

    def progress(self) -> dict[str, Any]:
        """Return how far the prompts are and the random generator, as plain values for a checkpoint."""

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue from what `progress` returned."""


def rollout_env(envs: Any) -> RolloutEnv:
    """Return the part of an environment that agents talk to, below its wrappers.

    Raises:
        ConfigError: `envs` is not a batch of texts.
    """
    base = getattr(envs, "unwrapped", None)
    if isinstance(base, VectorEnv) and hasattr(base, "whole_episodes"):
        return cast(RolloutEnv, base)
    raise ConfigError(
        f"agents need a batch of texts, and {type(envs).__name__} is none: make one with "
        "gym.make_vec('textgym/Text-v0', num_envs=16, ...), or see textgym.envs.interface.RolloutEnv for what an "
        "environment of your own must have"
    )
