"""EpisodeReplayBuffer: SB3's replay buffer at sequence cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from textgym.models.architectures.attention import PackedStates
from textgym.sb3.policies import token_space


class Episode(NamedTuple):
    """A text with its rewards: T transitions.

    Attributes:
        input_ids: prompt and response.
        prompt_length: of them.
        rewards: `(T,)`, one for each response token.
        terminated: whether its last transition has no next state to bootstrap from.
    """

    input_ids: np.ndarray
    prompt_length: int
    rewards: np.ndarray
    terminated: bool


class Piece(NamedTuple):
    """The transitions `first` to `last`, exclusive, of an episode."""

    episode: Episode
    first: int
    last: int


class EpisodeReplayBuffer(ReplayBuffer):
    """Keeps every episode once, as token ids, and hands out transitions whose states share passes.

    An episode without a score is forgotten when it ends: nothing can be learned from it.

    A batch is made of whole episodes in random order, the first and the last one cut to fill it. Every transition is as
    likely as any other, none comes twice in a batch unless the buffer holds fewer, and both networks need one pass over
    each episode. Transitions of one episode are correlated: a batch of 256 holds as many independent texts as 10 to 20
    of single transitions would, at their cost.

    Args:
        buffer_size: transitions kept; the oldest episodes go first.
        observation_space: of a text environment.
        action_space: of a text environment.
        device: of what is handed out.
        n_envs: rows.
        optimize_memory_usage: nothing is left to optimise, so it is refused.
        handle_timeout_termination: bootstrap from the last state of truncated episodes.
        n_steps: rewards summed before bootstrapping; a score at the end then reaches earlier tokens at once.
        gamma: discount of these sums, DQN's own.

    Raises:
        ValueError: `optimize_memory_usage`, `n_steps` below 1, or an environment for encoder-decoder models.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 1.0,
    ) -> None:
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise ValueError("EpisodeReplayBuffer keeps each token once already: leave optimize_memory_usage off")
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        self.tokens = token_space(action_space)
        if self.tokens.decoder_start:
            raise ValueError(
                "EpisodeReplayBuffer keeps the texts of causal models: for an encoder-decoder model use PPO with "
                "EpisodeRolloutBuffer, or textgym.agents.DQN"
            )
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps, self.gamma = n_steps, gamma
        self.optimize_memory_usage = False
        self.reset()

    def reset(self) -> None:
        """Empties the buffer."""
        width = self.obs_shape["input_ids"][0]  # type: ignore[call-overload]  # a dict, of a Dict space
        self.episodes: list[Episode] = []
        self.num_transitions = 0  # in `episodes`
        self.input_ids = np.zeros((self.n_envs, width + 1), dtype=np.min_scalar_type(int(self.tokens.n) - 1))
        self.rewards = np.zeros((self.n_envs, width), dtype=np.float32)
        self.lengths = np.zeros(self.n_envs, dtype=np.int64)  # of the episodes under way, 0 where there is none
        self.prompt_lengths = np.zeros(self.n_envs, dtype=np.int64)
        super().reset()

    def size(self) -> int:
        """Transitions held."""
        return self.num_transitions + int((self.lengths - self.prompt_lengths).sum())

    def add(  # type: ignore[override]
        self,
        obs: dict[str, np.ndarray],
        next_obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """One step of all rows."""
        rows, lengths = np.arange(self.n_envs), obs["attention_mask"].sum(1)
        for row in np.flatnonzero(~self._continues(obs["input_ids"], lengths)):  # what was under way was abandoned
            self._close(row, terminated=False)
            self.input_ids[row, : lengths[row]] = obs["input_ids"][row, : lengths[row]]
            self.prompt_lengths[row] = lengths[row]
        self.input_ids[rows, lengths] = action.reshape(-1)
        self.rewards[rows, lengths - self.prompt_lengths] = reward
        self.lengths = lengths + 1
        for row in np.flatnonzero(done):
            if not infos[row].get("scored", True):
                self._forget(row)
                continue
            timeout = self.handle_timeout_termination and infos[row].get("TimeLimit.truncated", False)
            self._close(row, terminated=not timeout)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
        """`batch_size` transitions: whole episodes, but for the first and the last one.

        Raises:
            ValueError: the buffer is empty.
        """
        pieces = self._sample_pieces(batch_size)
        current, following, rewards, ended, discounts = (
            np.concatenate(columns) for columns in zip(*map(self._transitions, pieces), strict=True)
        )
        row = np.repeat(np.arange(len(pieces)), [piece.last - piece.first for piece in pieces])
        actions = [p.episode.input_ids[p.episode.prompt_length :][p.first : p.last] for p in pieces]
        return DictReplayBufferSamples(
            self._states(pieces, row, current),  # type: ignore[arg-type]  # handed on to our networks as they are
            self._column(np.concatenate(actions).astype(np.int64)),
            self._states(pieces, row, following),  # type: ignore[arg-type]
            self._column(ended.astype(np.float32)),
            self._column(self._normalize_reward(rewards, env)),
            self._column(discounts) if self.n_steps > 1 else None,  # DQN then takes its own gamma
        )

    def nbytes(self) -> int:
        """Bytes of all tokens and rewards held."""
        return sum(e.input_ids.nbytes + e.rewards.nbytes for e in self.episodes) + (
            self.input_ids.nbytes + self.rewards.nbytes
        )

    def _continues(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Bool `(B,)`: the rows that show the episode under way."""
        beyond = np.arange(input_ids.shape[1]) >= lengths[:, None]
        same = (input_ids == self.input_ids[:, : input_ids.shape[1]]) | beyond
        return np.asarray((lengths == self.lengths) & same.all(1))

    def _transitions(self, piece: Piece) -> tuple[np.ndarray, ...]:
        """Sizes of the states before and after, rewards, ends and discounts, of n-step transitions."""
        episode, count = piece.episode, len(piece.episode.rewards)
        step = np.arange(piece.first, piece.last)
        after = np.minimum(step + self.n_steps, count)
        rewards = np.zeros(len(step), dtype=np.float32)
        for ahead in range(min(self.n_steps, count)):
            inside = step + ahead < count
            rewards[inside] += self.gamma**ahead * episode.rewards[step[inside] + ahead]
        ended = episode.terminated & (after == count)
        discounts = (self.gamma ** (after - step)).astype(np.float32)
        return episode.prompt_length + step, episode.prompt_length + after, rewards, ended, discounts

    def _states(self, pieces: list[Piece], row: np.ndarray, sizes: np.ndarray) -> PackedStates:
        """The first `sizes` `(M,)` tokens of the episodes in `row` `(M,)`, one pass over each episode."""
        lengths = np.zeros(len(pieces), dtype=np.int64)
        np.maximum.at(lengths, row, sizes)
        ids = np.zeros((len(pieces), lengths.max()), dtype=np.int64)
        for index, piece in enumerate(pieces):
            ids[index, : lengths[index]] = piece.episode.input_ids[: lengths[index]]
        return PackedStates.prefixes(*map(self.to_torch, (ids, lengths, row, sizes)))

    def _sample_pieces(self, batch_size: int) -> list[Piece]:
        """A stretch of a ring of all episodes in random order, from a transition that is as likely as any other.

        To draw whole episodes and cut the last one would favour short texts, and the middle of long ones over their
        ends, where the score is.
        """
        under_way = np.flatnonzero(self.lengths > self.prompt_lengths)
        sizes = np.array(
            [len(episode.rewards) for episode in self.episodes]
            + (self.lengths - self.prompt_lengths)[under_way].tolist()
        )
        if not len(sizes):
            raise ValueError(
                "the replay buffer is empty: add transitions before sampling; episodes without a score are not kept"
            )
        order = np.random.permutation(len(sizes))  # noqa: NPY002  (the generator that SB3 seeds)
        ends = sizes[order].cumsum()
        start = np.random.randint(ends[-1])  # noqa: NPY002
        place = int(np.searchsorted(ends, start, side="right"))
        first = int(sizes[order[place]] - (ends[place] - start))
        pieces: list[Piece] = []
        missing = batch_size
        while missing:
            index = int(order[place])
            done = index < len(self.episodes)
            episode = self.episodes[index] if done else self._under_way(under_way[index - len(self.episodes)])
            count = min(missing, len(episode.rewards) - first)
            pieces.append(Piece(episode, first, first + count))
            missing -= count
            place, first = (place + 1) % len(order), 0
        return pieces

    def _under_way(self, row: int | np.integer[Any], terminated: bool = False) -> Episode:
        prompt, length = int(self.prompt_lengths[row]), int(self.lengths[row])
        return Episode(
            self.input_ids[row, :length].copy(), prompt, self.rewards[row, : length - prompt].copy(), terminated
        )

    def _close(self, row: int | np.integer[Any], terminated: bool) -> None:
        """Files the episode of a row away, and makes room for it."""
        if self.lengths[row] > self.prompt_lengths[row]:
            self.episodes.append(self._under_way(row, terminated))
            self.num_transitions += len(self.episodes[-1].rewards)
        self._forget(row)
        old = 0
        while self.num_transitions > self.buffer_size and old < len(self.episodes) - 1:
            self.num_transitions -= len(self.episodes[old].rewards)
            old += 1
        del self.episodes[:old]

    def _forget(self, row: int | np.integer[Any]) -> None:
        self.lengths[row] = self.prompt_lengths[row] = 0

    def _column(self, values: np.ndarray) -> Tensor:
        return self.to_torch(values).reshape(-1, 1)
