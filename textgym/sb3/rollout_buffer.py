"""EpisodeRolloutBuffer: a rollout buffer for SB3 with one forward pass per sequence and a KL penalty."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.buffers import BaseBuffer, DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from torch import Tensor

from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.kl import KLController, KLPenalty, warn_of_filter
from textgym.sb3.policies import check_name, check_vocabulary, token_space
from textgym.settings import Estimator

CHUNK_TOKENS = 4096
"""Number of tokens whose KL is computed in one pass."""


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one row within one episode, which share a forward pass.

    Attributes:
        row: Row of the environment.
        start: First step in the buffer.
        context: Token ids before the first action, without start tokens of a decoder.
        prompt_length: Number of prompt tokens in `context`; the others were generated before this rollout began.
    """

    row: int
    start: int
    context: np.ndarray
    prompt_length: int


class EpisodeRolloutBuffer(DictRolloutBuffer):
    """Rollout buffer that stores one token per step and one context per segment, and applies the KL penalty.

    The observations of a minibatch are `PackedStates`: all states of a minibatch share one forward pass over their
    sequences. With a reference, every token's reward becomes reward - coef * KL estimate before GAE, with the log-probs
    of sampling (Ziegler et al., 2019, equation 2).

    A minibatch has about `batch_size` steps, because segments are not cut; with `batch_size=None` it has all steps.

    Args:
        buffer_size: Number of steps per row.
        observation_space: Observation space of a text environment.
        action_space: Action space of a text environment.
        device: Device of the minibatches.
        gae_lambda: lambda of GAE.
        gamma: Discount; a value other than 1 gives a warning, because it favours short texts.
        n_envs: Number of rows.
        reference: Name or path of the reference model.
        kl_coef: beta, in reward per nat, or a controller such as `AdaptiveKL`, which is updated with the mean KL of the
            episodes that end in a rollout.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`.
        kl_clamp: Clip the estimate of a token to [-kl_clamp, kl_clamp].

    Attributes:
        episode_kl: The KL of each episode that ended in the last rollout, in nats.

    Raises:
        ValueError: If the environment applies the penalty already, there is a coefficient but no reference, or the
            estimator needs whole distributions.
        TypeError: If the reference is not a name.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.spaces.Dict,
        action_space: gym.Space[Any],
        device: torch.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        reference: str | os.PathLike[str] | None = None,
        kl_coef: float | KLController = 0.0,
        kl_estimator: Estimator = "k1",
        kl_clamp: float | None = None,
    ) -> None:
        self.tokens = token_space(action_space)
        self.penalty: KLPenalty | None = None
        self.prompt_lengths = np.zeros(n_envs, dtype=np.int64)
        self.lengths = np.zeros(n_envs, dtype=np.int64)
        self.kl_so_far = np.zeros(n_envs)
        self.episode_kl: list[float] = []
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs=n_envs)
        warn_of_discount(gamma)
        if reference is not None:
            self.penalty = self._make_penalty(reference, kl_coef, kl_estimator, kl_clamp)
        elif kl_coef != 0:
            raise ValueError("kl_coef is set but there is no reference: name one, for example reference='tiny'")

    def reset(self) -> None:
        """Empty the buffer; the state of current episodes is kept."""
        shape = (self.buffer_size, self.n_envs)
        self.actions = np.zeros(shape, dtype=np.min_scalar_type(int(self.tokens.n) - 1))
        self.rewards, self.returns, self.values, self.log_probs, self.advantages = (
            np.zeros(shape, dtype=np.float32) for _ in range(5)
        )
        self.episode_starts = np.zeros(shape, dtype=bool)
        self.segments: list[Segment] = []
        BaseBuffer.reset(self)

    def add(  # type: ignore[override]
        self,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Add a step of all rows.

        Raises:
            ValueError: If an observation is not the previous one with the action appended.
        """
        begins = np.asarray(episode_start, dtype=bool)
        contexts, lengths, prompt_lengths = rows_of(obs, self.tokens.decoder_start)
        new = np.ones_like(begins) if self.pos == 0 else begins
        if self.pos and not (lengths == self.lengths + 1)[~new].all():
            raise ValueError("EpisodeRolloutBuffer needs an environment whose observation grows by one token per step")
        self.lengths = lengths
        self.prompt_lengths = np.where(begins | (self.prompt_lengths == 0), prompt_lengths, self.prompt_lengths)
        for row in np.flatnonzero(new):
            context = contexts[row, : lengths[row]].astype(self.actions.dtype)
            self.segments.append(Segment(int(row), self.pos, context, int(self.prompt_lengths[row])))
        self.actions[self.pos] = action.reshape(-1)
        self.rewards[self.pos] = reward
        self.episode_starts[self.pos] = begins
        self.values[self.pos] = value.cpu().numpy().flatten()
        self.log_probs[self.pos] = log_prob.cpu().numpy()
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Subtract the KL penalty from the rewards, then compute GAE as SB3 does."""
        self.segment_lengths = self._measure_segments()
        if self.penalty is not None:
            kl = self._kl(self.penalty)
            self.rewards = self.penalty.charge(torch.from_numpy(self.rewards), torch.from_numpy(kl)).numpy()
            self._count_episodes(kl, dones)
            if self.episode_kl:
                self.penalty.controller.update(float(np.mean(self.episode_kl)), len(self.episode_kl))
        super().compute_returns_and_advantage(last_values, dones)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Yield minibatches of whole segments in random order, with about `batch_size` steps each."""
        assert self.full, "the rollout is not complete"
        for chosen in self._batches(np.random.permutation(len(self.segments)), batch_size):  # noqa: NPY002  (as SB3)
            yield self._segment_samples(chosen)

    def nbytes(self) -> int:
        """Return the size of the buffer in bytes."""
        arrays = (
            self.actions,
            self.rewards,
            self.returns,
            self.values,
            self.log_probs,
            self.advantages,
            self.episode_starts,
            *(segment.context for segment in self.segments),
        )
        return sum(array.nbytes for array in arrays)

    def _segment_samples(self, chosen: np.ndarray) -> Any:
        """Return the training samples of these segments, in the order of their tokens."""
        sequences = self._sequences(chosen)
        where = self._where(chosen)
        return DictRolloutBufferSamples(
            sequences.states(),  # type: ignore[arg-type]  # SB3 passes them on to our policy unchanged
            sequences.actions,
            *(self.to_torch(x[where]) for x in (self.values, self.log_probs, self.advantages, self.returns)),
        )

    def _sequences(self, chosen: np.ndarray) -> Sequences:
        """Return segments as sequences; a response is the tokens from before this rollout, if any, and the actions."""
        segments = [self.segments[index] for index in chosen]
        responses = [
            self.actions[segment.start : segment.start + length, segment.row]
            for segment, length in zip(segments, self.segment_lengths[chosen], strict=True)
        ]
        contexts = [len(segment.context) for segment in segments]
        lengths = np.array(contexts) + self.segment_lengths[chosen]
        ids = np.zeros((len(segments), lengths.max()), dtype=np.int64)
        parts = [part for pair in zip((s.context for s in segments), responses, strict=True) for part in pair]
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(parts)
        prompts = np.array([segment.prompt_length for segment in segments])
        earlier = np.array(contexts) - prompts  # tokens from before this rollout: context, not trained on
        generated = np.arange((lengths - prompts).max()) >= earlier[:, None] if earlier.any() else None
        return Sequences(
            self.to_torch(ids),
            self.to_torch(prompts),
            self.to_torch(lengths - prompts),
            generated=None if generated is None else self.to_torch(generated),
            decoder_start=self.tokens.decoder_start,
        )

    def _where(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return step and row of every token of these segments, in order."""
        lengths = self.segment_lengths[chosen]
        starts = np.array([self.segments[index].start for index in chosen])
        rows = np.array([self.segments[index].row for index in chosen])
        steps = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        return steps, np.repeat(rows, lengths)

    def _batches(self, order: np.ndarray, batch_size: int | None) -> Iterator[np.ndarray]:
        """Split segments into parts with about equal numbers of tokens, close to `batch_size`."""
        ends = self.segment_lengths[order].cumsum()
        parts = 1 if batch_size is None else max(1, round(ends[-1] / batch_size))
        middles = ends - self.segment_lengths[order] / 2  # a segment is in the part that has its middle
        part = (middles * parts / ends[-1]).astype(int)
        yield from (order[part == index] for index in range(parts) if (part == index).any())

    def _measure_segments(self) -> np.ndarray:
        """Return the number of steps of each segment, which ends where the next one of its row starts."""
        lengths = np.zeros(len(self.segments), dtype=np.int64)
        following = np.full(self.n_envs, self.buffer_size)
        for index in reversed(range(len(self.segments))):
            segment = self.segments[index]
            lengths[index] = following[segment.row] - segment.start
            following[segment.row] = segment.start
        return lengths

    def _kl(self, penalty: KLPenalty) -> np.ndarray:
        """Return the KL estimate of every token, `(buffer_size, n_envs)` nats, by packed passes of the reference."""
        penalty.reference.temperature = self.tokens.temperature  # otherwise the KL of equal models would not be 0
        kl = np.zeros_like(self.rewards)
        for chosen in self._batches(np.arange(len(self.segments)), CHUNK_TOKENS):
            where = self._where(chosen)
            reference = self._reference_log_probs(penalty.reference, chosen)
            log_probs = self.to_torch(self.log_probs[where])
            kl[where] = penalty.of_log_probs(log_probs, reference).cpu().numpy()
        return kl

    def _reference_log_probs(self, reference: TokenModel, chosen: np.ndarray) -> Tensor:
        sequences = self._sequences(chosen)
        return reference.state_log_probs(sequences.states(), sequences.actions)

    def _count_episodes(self, kl: np.ndarray, dones: np.ndarray) -> None:
        """Sum the KL of each episode, which may have begun in an earlier rollout."""
        self.episode_kl = []
        for segment, length in zip(self.segments, self.segment_lengths, strict=True):
            end = segment.start + length
            if self.episode_starts[segment.start, segment.row]:
                self.kl_so_far[segment.row] = 0.0  # drop the KL of an episode that was abandoned by a reset
            self.kl_so_far[segment.row] += kl[segment.start : end, segment.row].sum()
            if dones[segment.row] if end == self.buffer_size else self.episode_starts[end, segment.row]:
                self.episode_kl.append(float(self.kl_so_far[segment.row]))
                self.kl_so_far[segment.row] = 0.0

    def _make_penalty(
        self, reference: Any, kl_coef: float | KLController, kl_estimator: Estimator, kl_clamp: float | None
    ) -> KLPenalty:
        check_name("reference", reference)
        if kl_estimator == "full":
            raise ValueError("kl_estimator='full' needs whole distributions, which SB3 does not pass on: use 'k1'")
        model = TokenModel.load(str(reference), device=self.device)
        check_vocabulary(model, self.tokens, "the reference")
        if kl_coef != 0:
            self.tokens.pay_kl("EpisodeRolloutBuffer")
            warn_of_filter(self.tokens.action_mask, kl_estimator)
        return KLPenalty(model, kl_coef, kl_estimator, kl_clamp)


def warn_of_discount(gamma: float) -> None:
    """Warn that SB3's default discount is not meant for text."""
    if gamma != 1.0:
        warnings.warn(
            f"gamma={gamma} discounts the score at the end of the text, which favours short texts: pass gamma=1.0",
            stacklevel=2,
        )


def rows_of(obs: dict[str, np.ndarray], start: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return observations as right-padded rows of prompt and response `(B, W)`, lengths, and prompt lengths `(B,)`.

    The observation of a causal model does not mark the prompt, so there the prompt length is the whole length.
    """
    prompt_lengths = obs["attention_mask"].sum(1)
    if not start:
        return obs["input_ids"], prompt_lengths, prompt_lengths
    lengths = prompt_lengths + obs["decoder_attention_mask"].sum(1) - len(start)
    rows = np.zeros((len(lengths), obs["input_ids"].shape[1] + obs["decoder_input_ids"].shape[1]), dtype=np.int64)
    slots = np.arange(rows.shape[1])
    real_prompt, real_response = obs["attention_mask"] > 0, obs["decoder_attention_mask"][:, len(start) :] > 0
    rows[slots < prompt_lengths[:, None]] = obs["input_ids"][real_prompt]
    rows[(slots >= prompt_lengths[:, None]) & (slots < lengths[:, None])] = obs["decoder_input_ids"][:, len(start) :][
        real_response
    ]
    return rows, lengths, prompt_lengths
